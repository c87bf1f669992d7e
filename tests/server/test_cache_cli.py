"""`kvkeep cache` against a running server and against a folder of blocks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server
from tests.servers import free_port

TEXT = "Seven bridges cross the river between the mill and the sea. " * 8
KEY, ADMIN = "key-of-anna", "key-of-admin"


def invoke(*args: str, stdin: str | None = None, **env: str) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, ["cache", *args], input=stdin, env=env)


def answer(*args: str, **env: str) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    result = invoke(*args, "--json", **env)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture
def url(server: RunningServer) -> str:
    """The module's server, with one session in an otherwise empty cache."""
    with server.client() as client:
        everything = {"all": True, "include_pinned": True}
        client.post("/v1/cache/purge", json=everything).raise_for_status()
        body = {
            "model": "tiny", "prompt": TEXT, "max_tokens": 1,
            "kv_cache": {"session": "s", "tags": ["doc:1"]},
        }  # fmt: skip
        client.post("/v1/completions", json=body).raise_for_status()
    return server.url


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a process has written the blocks of two prompts before it ended."""
    folder = tmp_path_factory.mktemp("blocks") / "disk"
    with LLM("tiny", capacity="16MB", tiers=[f"disk:{folder}:1GB"]) as llm:
        params = SamplingParams(max_tokens=1)
        options = CacheOptions(session="s", tags=["doc:1"])
        llm.generate(TEXT, params, cache=options)
        llm.generate(f"Other. {TEXT}", params, cache=CacheOptions(tags=["doc:2"]))
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of such a folder that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "disk"))


def request_file(tmp_path: Path, **request: Any) -> str:
    """A request in a file."""
    path = tmp_path / "request.json"
    path.write_text(json.dumps(request))
    return str(path)


def test_ls_shows_who_uses_what(url: str) -> None:
    """Rows with sessions, tags and sizes; as JSON the same."""
    (row,) = answer("ls", "--url", url)["data"]
    assert row["sessions"] == ["s"]
    assert row["tags"] == ["doc:1"]

    shown = invoke("ls", "--url", url)

    assert shown.exit_code == 0
    assert "doc:1" in shown.stdout
    assert str(row["blocks"]) in shown.stdout
    assert answer("ls", "--tag", "doc:2", "--url", url)["data"] == []
    assert "nothing is cached" in invoke("ls", "--tag", "doc:2", "--url", url).stdout


@pytest.mark.parametrize("kind", ["sessions", "contexts", "pins", "blocks"])
def test_every_kind_can_be_listed(url: str, kind: str) -> None:
    """With rows and without."""
    if kind in ("contexts", "pins"):
        assert f"no {kind}" in invoke("ls", f"--{kind}", "--url", url).stdout
        warm = invoke("warm", "-", "--name", "w", "--pin", "--url", url, stdin="Hello there. " * 20)
        assert warm.exit_code == 0, warm.output

    rows = answer("ls", f"--{kind}", "--url", url)["data"]
    shown = invoke("ls", f"--{kind}", "--url", url)

    assert rows
    name = rows[0].get("id") or rows[0]["name"]
    assert name in shown.stdout.replace("\n", "")
    invoke("rm", "--context", "w", "--url", url)


def test_show_names_all_fields(url: str) -> None:
    """Of a block and of a session; what is not there is exit code 1 and one line."""
    (one, *_) = answer("ls", "--blocks", "--url", url)["data"]

    assert answer("show", one["id"], "--url", url) == one
    assert f"id: {one['id']}" in invoke("show", one["id"], "--url", url).stdout
    assert len(answer("show", one["id"], "--text", "--url", url)["content"]["text"]) > 32
    assert invoke("show", "s", "--session", "--text", "--url", url).exit_code == 2
    assert answer("show", "s", "--session", "--url", url)["id"] == "s"
    missing = invoke("show", "ab" * 32, "--url", url)
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: there is no entry")


def test_stats_count_the_device(url: str) -> None:
    """A table, and the object of the server."""
    state = answer("stats", "--url", url)

    shown = invoke("stats", "--url", url).stdout

    assert state["tiers"]["device"]["entries"] > 0
    assert "device" in shown
    assert "tokens reused" in shown


def test_lookup_tells_of_a_prompt_that_was_not_sent(url: str, tmp_path: Path) -> None:
    """From a file, from stdin and as an option; with what was missed."""
    file = request_file(tmp_path, model="tiny", prompt=TEXT, max_tokens=9)
    assert answer("lookup", file, "--url", url)["known_tokens"] > 32

    known = invoke("lookup", "--prompt", TEXT, "--url", url)
    piped = invoke("lookup", "-", "--url", url, stdin=json.dumps({"prompt": f"X{TEXT}"}))

    assert "tokens are cached" in known.stdout
    assert "missed: " in piped.stdout
    assert invoke("lookup", "--url", url).exit_code == 2
    assert invoke("lookup", "-", "--url", url, stdin="{").exit_code == 2
    assert invoke("lookup", "-", "--url", url, stdin="{}").exit_code == 2


def test_warm_computes_a_catalogue_with_every_entry_by_its_name(url: str, tmp_path: Path) -> None:
    """A dry run looks them up; then they are known, with what each line asks for."""
    catalogue = tmp_path / "catalogue.jsonl"
    entries: list[dict[str, Any]] = [
        {"name": "teapot", "prompt": "A teapot of blue clay. " * 20, "tags": ["product:1"]},
        {"name": "kettle", "messages": [{"role": "system", "content": "A kettle. " * 40}]},
    ]
    catalogue.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")

    planned = answer("warm", str(catalogue), "--dry-run", "--url", url)
    done = answer("warm", str(catalogue), "--ttl", "1h", "--url", url)
    shown = invoke("warm", str(catalogue), "--url", url)

    assert [row["known_tokens"] for row in planned["data"]] == [0, 0]
    assert [row["name"] for row in done["data"]] == ["teapot", "kettle"]
    assert done["data"][0]["tags"] == ["product:1"]
    assert all(row["ttl"] == "1h" for row in done["data"])
    assert done["failed"] == 0
    assert "teapot: " in shown.stdout
    assert answer("lookup", "--prompt", entries[0]["prompt"], "--url", url)["known_tokens"] > 32
    for name in ("teapot", "kettle"):
        assert answer("rm", "--context", name, "--url", url)["data"][0]["deleted"] > 0


def test_a_catalogue_with_a_bad_line_computes_nothing(url: str, tmp_path: Path) -> None:
    """It is read to its end before anything is sent."""
    catalogue = tmp_path / "catalogue.jsonl"
    catalogue.write_text('{"name": "good", "prompt": "Some words. "}\n{"prompt": "no name"}\n')

    result = invoke("warm", str(catalogue), "--url", url)

    assert result.exit_code == 2
    assert "line 2 has no name" in result.stderr
    assert answer("ls", "--contexts", "--url", url)["data"] == []


def test_one_refused_entry_of_a_catalogue_does_not_stop_the_others(
    url: str, tmp_path: Path
) -> None:
    """Each is tried, and the exit code says that one failed."""
    catalogue = tmp_path / "catalogue.jsonl"
    lines = [{"name": "bad", "token_ids": [2**31]}, {"name": "good", "prompt": TEXT}]
    catalogue.write_text("\n".join(map(json.dumps, lines)))

    result = invoke("warm", str(catalogue), "--url", url)

    assert result.exit_code == 1
    assert "bad: " in result.stderr
    assert "good: " in result.stdout
    invoke("rm", "--context", "good", "--url", url)


def test_pin_and_unpin(url: str, tmp_path: Path) -> None:
    """A session or a prompt is kept while it is pinned; clear says what it skipped."""
    file = request_file(tmp_path, prompt=TEXT)
    blocks = answer("pin", "one", "--session", "s", "--url", url)["blocks"]
    assert answer("pin", "two", "--file", file, "--url", url)["blocks"] <= blocks

    shown = invoke("clear", "--yes", "--url", url)

    assert "are pinned and stay" in shown.stdout
    for name in ("one", "two"):
        assert invoke("unpin", name, "--url", url).exit_code == 0
    assert invoke("unpin", "one", "--url", url).exit_code == 1


def test_rm_forgets_what_is_named(url: str, tmp_path: Path) -> None:
    """By key, tag, prompt and session, after a dry run that forgets nothing."""
    (block, *_) = answer("ls", "--blocks", "--url", url)["data"]
    dry = answer("rm", "--tag", "doc:1", "--dry-run", "--url", url)["data"]
    assert dry[0]["deleted"] > 1
    assert dry[0]["dry_run"] is True

    assert answer("rm", block["id"], "--url", url)["data"][0]["deleted"] == 1
    file = request_file(tmp_path, prompt=TEXT)
    by_prompt = answer("rm", "--file", file, "--url", url)["data"]
    assert by_prompt[0]["deleted"] >= dry[0]["deleted"] - 2
    assert answer("rm", "--session", "s", "--url", url)["data"]
    assert invoke("rm", "--url", url).exit_code == 2
    assert invoke("rm", "--session", "s", "--url", url).exit_code == 1


def test_clear_asks_first(url: str) -> None:
    """It says how much it is; no, or nothing, forgets nothing; yes forgets all."""
    refused = invoke("clear", "--url", url, stdin="n\n")
    assert refused.exit_code == 1
    assert "would be forgotten. Go on?" in refused.stderr
    assert answer("ls", "--url", url)["data"] != []

    done = invoke("clear", "--url", url, stdin="y\n")

    assert done.exit_code == 0
    assert answer("ls", "--url", url)["data"] == []


def test_export_and_import(url: str, tmp_path: Path) -> None:
    """A session's blocks as a file, which another server knows then."""
    file = tmp_path / "s.kvkeep"
    assert answer("export", str(file), "--session", "s", "--url", url)["bytes"] > 0
    assert answer("lookup", "--prompt", TEXT, "--url", url)["known_tokens"] > 32
    invoke("clear", "--yes", "--url", url)

    assert answer("import", str(file), "--url", url)["added"] > 0

    assert answer("lookup", "--prompt", TEXT, "--url", url)["known_tokens"] > 32
    assert invoke("export", str(file), "--session", "nobody", "--url", url).exit_code == 1
    assert not (tmp_path / "s.kvkeep.partial").exists()


def test_watch_prints_events(url: str) -> None:
    """The first one says that it listens."""
    plain = invoke("watch", "--num", "1", "--url", url)
    encoded = invoke("watch", "--num", "1", "--json", "--url", url)

    assert "subscribed" in plain.stdout
    assert json.loads(encoded.stdout)["type"] == "subscribed"


def test_keys_are_sent_and_a_wrong_one_is_one_line() -> None:
    """From the flag or from the environment; an API key does not administer."""
    with running_server(api_keys=(KEY,), admin_key=ADMIN) as server:
        given = invoke("stats", "--url", server.url, "--api-key", ADMIN)
        env = invoke("stats", KVKEEP_URL=server.url, KVKEEP_API_KEYS=KEY, KVKEEP_ADMIN_KEY=ADMIN)
        own = invoke("ls", "--sessions", KVKEEP_URL=server.url, KVKEEP_API_KEYS=f"{KEY} other-key")
        weak = invoke("stats", "--url", server.url, "--api-key", KEY)
        none = invoke("stats", "--url", server.url)

    for done in (given, env, own):
        assert done.exit_code == 0, done.output
    for refused in (weak, none):
        assert refused.exit_code == 1
        assert refused.stderr.startswith("error: ")
        assert len(refused.stderr.splitlines()) == 1


def test_no_server_is_exit_code_3() -> None:
    """With the address and what to do; also where something else listens."""
    url = f"http://127.0.0.1:{free_port()}"
    for args in (["stats"], ["ls"], ["watch"], ["rm", "--tag", "a"], ["lookup", "--prompt", "a"]):
        result = invoke(*args, "--url", url)

        assert result.exit_code == 3, result.output
        assert f"{url} cannot be reached" in result.stderr
        assert "kvkeep serve" in result.stderr


@pytest.mark.parametrize("url", ["nowhere", "ftp://127.0.0.1", "http://"])
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    """Exit code 2 before anything is sent."""
    assert invoke("stats", "--url", url).exit_code == 2


def test_a_folder_is_listed_by_its_labels(folder: Path) -> None:
    """What a process has left on the disk, without a model and without a server."""
    rows = answer("ls", "--folder", str(folder))["data"]
    assert {tuple(row["tags"]) for row in rows} == {("doc:1",), ("doc:2",)}
    (own,) = answer("ls", "--folder", str(folder), "--session", "s")["data"]
    assert own["sessions"] == ["s"]
    assert own["blocks"] == own["tiers"]["disk"] > 2

    state = answer("stats", "--folder", str(folder))["tiers"]["disk"]

    assert state["entries"] == sum(row["tiers"]["disk"] for row in rows)
    assert state["used_bytes"] == sum(row["bytes"] for row in rows)
    assert "doc:1" in invoke("ls", "--folder", str(folder)).stdout
    assert "disk" in invoke("stats", "--folder", str(folder)).stdout
    assert invoke("ls", "--pins", "--folder", str(folder)).exit_code == 2


def test_a_folder_forgets_by_tag_key_and_age(folder: Path) -> None:
    """The receipt of the dry run is that of the deed; what was not meant stays."""
    at = ("--folder", str(folder))
    rows = {row["tags"][0]: row for row in answer("ls", *at)["data"]}
    dry = answer("rm", "--tag", "doc:1", "--dry-run", *at)["data"][0]
    done = answer("rm", "--tag", "doc:1", *at)["data"][0]
    assert done == dry | {"dry_run": False}
    assert done["deleted"] == rows["doc:1"]["blocks"]
    (left,) = answer("ls", *at)["data"]
    assert left["tags"] == ["doc:2"]
    assert left["bytes"] == rows["doc:2"]["bytes"]
    (name, *_) = sorted(folder.glob("objects/*/*"))
    key = name.name[:64]
    assert answer("show", key, *at)["tags"] == ["doc:2"]

    assert answer("rm", key, *at)["data"][0]["deleted"] == 1
    assert answer("rm", "--older-than", "1h", *at)["data"][0]["matched"] == 0
    assert answer("clear", "--yes", *at)["deleted"] == rows["doc:2"]["blocks"] - 1

    assert answer("ls", *at)["data"] == []
    assert invoke("show", key, *at).exit_code == 1
    assert invoke("rm", "nokey", *at).exit_code == 2
    assert invoke("rm", *at).exit_code == 2
    assert invoke("rm", "--context", "c", *at).exit_code == 2


def test_a_purged_folder_is_what_a_new_process_finds(folder: Path) -> None:
    """What was deleted is computed again, what was left is loaded."""
    answer("rm", "--tag", "doc:1", "--folder", str(folder))

    with LLM("tiny", capacity="16MB", tiers=[f"disk:{folder}:1GB"], loading="always") as llm:
        purged = llm.cache.coverage(llm.encode(TEXT))
        left = llm.cache.coverage(llm.encode(f"Other. {TEXT}"))

    assert purged.known_tokens == 0
    assert left.known_tokens >= 64
