"""`kvkeep cache` with options that mean nothing together, more rows than are shown, and several tenants."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server

TEXT = "Nine ships lie in the harbour and wait for the tide to turn. " * 8
ADMIN, KEYS = "key-of-the-admin", ("key-of-anna", "key-of-bert")


def invoke(*args: str, stdin: str | None = None) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, ["cache", *args], input=stdin)


def answer(*args: str) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the blocks of two sessions."""
    found = tmp_path_factory.mktemp("blocks") / "disk"
    with LLM("tiny", capacity="16MB", tiers=[f"disk:{found}:1GB"]) as llm:
        for session in ("s", "t"):
            options = CacheOptions(session=session, tags=["doc:1"])
            llm.generate(session + TEXT, SamplingParams(max_tokens=1), cache=options)
    return found


@pytest.fixture(scope="module")
def url(server: RunningServer) -> str:
    """The module's server, with three sessions in it."""
    with server.client() as client:
        for session in ("s", "t", "u"):
            body = {"prompt": session + TEXT, "max_tokens": 1, "kv_cache": {"session": session}}
            client.post("/v1/completions", json=body).raise_for_status()
    return server.url


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    """A server with two keys, each with a session and a context of one name."""
    with running_server(api_keys=KEYS, admin_key=ADMIN) as found:
        for key in KEYS:
            with found.client(key) as client:
                body = {"prompt": TEXT, "max_tokens": 1, "kv_cache": {"session": "user-42"}}
                client.post("/v1/completions", json=body).raise_for_status()
                context = {"name": "law", "prompt": TEXT}
                client.post("/v1/cache/contexts", json=context).raise_for_status()
        yield found


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ls", "--sessions", "--pins"], "--sessions and --pins exclude one another"),
        (["ls", "--contexts", "--blocks"], "--contexts and --blocks exclude one another"),
        (["ls", "--sessions", "--tag", "x"], "--tag means nothing to --sessions"),
        (["ls", "--pins", "--salt", "x"], "--salt means nothing to --pins"),
        (["ls", "--contexts", "--sort", "bytes"], "--sort means nothing to --contexts"),
        (["ls", "--sort", "bytes"], "--sort is for --blocks"),
        (["show", "x", "--session", "--context"], "--session and --context exclude one another"),
        (["show", "x", "--session", "--text"], "leave it or --session out"),
    ],
    ids=" ".join,
)
def test_options_that_mean_nothing_together_are_wrong_usage(
    args: list[str], message: str, url: str
) -> None:
    """None of them is dropped without a word."""
    result = invoke(*args, "--url", url)

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("args", "flag"),
    [
        (["ls", "--salt", "x"], "--salt"),
        (["ls", "--tier", "disk"], "--tier"),
        (["ls", "--blocks", "--sort", "bytes"], "--sort"),
        (["ls", "--sessions"], "--sessions"),
        (["ls", "--tenant", "x"], "--tenant"),
        (["show", "x", "--session"], "--session"),
        (["show", "x", "--text"], "--text"),
        (["show", "x", "--salt", "x"], "--salt"),
        (["stats", "--tenant", "x"], "--tenant"),
        (["rm", "--tag", "x", "--tenant", "x"], "--tenant"),
        (["rm", "--file", "x"], "--file"),
        (["clear", "--yes", "--tenant", "x"], "--tenant"),
        (["clear", "--yes", "--salt", "x"], "--salt"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else one,
)
def test_what_a_folder_does_not_know_needs_a_server(
    args: list[str], flag: str, folder: Path
) -> None:
    """A list that was to be of one tenant must not be of all, and the option is named as it was typed."""
    before = sorted(folder.rglob("objects/*/*"))

    result = invoke(*args, "--folder", str(folder))

    assert result.exit_code == 2
    assert f"{flag} needs a server; leave --folder out" in result.stderr
    assert sorted(folder.rglob("objects/*/*")) == before


def test_the_blocks_of_a_folder_are_listed(folder: Path) -> None:
    """With their whole keys, of one session too."""
    stored = {path.name[:64] for path in folder.glob("objects/*/*")}

    rows = answer("ls", "--blocks", "--folder", str(folder))["data"]
    own = answer("ls", "--blocks", "--session", "s", "--folder", str(folder))["data"]
    shown = invoke("ls", "--blocks", "--folder", str(folder)).stdout

    assert {one["id"] for one in rows} == stored
    assert {one["id"] for one in own} < stored
    assert all(key in shown for key in stored)


def test_who_does_not_see_all_rows_is_told(url: str, folder: Path) -> None:
    """With how many there are, where that is known; the JSON says it in a field."""
    for at in (("--url", url), ("--folder", str(folder))):
        for kind in ((), ("--blocks",)):
            cut = invoke("ls", *kind, "--limit", "1", *at)
            assert "first 1" in cut.stderr
            assert "--limit shows more" in cut.stderr
            assert answer("ls", *kind, "--limit", "1", *at)["has_more"] is True
            assert answer("ls", *kind, "--limit", "1000", *at)["has_more"] is False
            assert "first" not in invoke("ls", *kind, "--limit", "1000", *at).stderr
    assert "first 2 of 3 rows" in invoke("ls", "--sessions", "--limit", "2", "--url", url).stderr


def test_a_tier_that_is_not_there_is_named_with_those_that_are(url: str) -> None:
    """An empty list would say that nothing lies in it."""
    result = invoke("ls", "--tier", "devise", "--url", url)

    assert result.exit_code == 2
    assert "--tier='devise' is no tier there; did you mean device?" in result.stderr
    assert invoke("ls", "--tier", "device", "--tag", "none", "--url", url).exit_code == 0


def test_a_name_in_place_of_a_key_leads_to_sessions_and_contexts(url: str) -> None:
    """It cannot be a key; of what can be one nothing is said."""
    wrong = invoke("show", "garden", "--url", url)

    assert wrong.exit_code == 2
    assert "the first 8 or more, or --session or --context" in wrong.stderr
    assert "--context" not in invoke("show", "0" * 12, "--url", url).stderr


def test_rows_of_several_tenants_say_whose_they_are(shared: RunningServer) -> None:
    """One name stands there twice for the admin key; the column is what --tenant takes."""
    at = ("--url", shared.url, "--api-key", ADMIN)
    for kind, name in (("--sessions", "user-42"), ("--contexts", "law")):
        rows = [
            one
            for one in answer("ls", kind, *at)["data"]
            if name in (one.get("id"), one.get("name"))
        ]
        lines = invoke("ls", kind, *at).stdout.splitlines()
        assert len({one["tenant"] for one in rows}) == 2
        assert lines[0].endswith("tenant")
        for one in rows:
            assert sum(one["tenant"] in line for line in lines) >= 1
    assert invoke("ls", *at).stdout.splitlines()[0].endswith("tenant")
    own = invoke("ls", "--sessions", "--url", shared.url, "--api-key", KEYS[0]).stdout
    assert "tenant" not in own


def test_a_tenant_can_be_named(shared: RunningServer) -> None:
    """What the admin key shows and removes is then this tenant's alone."""
    at = ("--url", shared.url, "--api-key", ADMIN)
    first, second = sorted({one["tenant"] for one in answer("ls", "--sessions", *at)["data"]})

    assert answer("show", "user-42", "--session", "--tenant", first, *at)["id"] == "user-42"
    for kind in ("--sessions", "--contexts"):
        assert {one["tenant"] for one in answer("ls", kind, "--tenant", first, *at)["data"]} == {
            first
        }
    (gone,) = answer("rm", "--session", "user-42", "--tenant", first, *at)["data"]
    assert gone["deleted"] >= 0
    left = [
        one["tenant"] for one in answer("ls", "--sessions", *at)["data"] if one["id"] == "user-42"
    ]
    assert left == [second]
    assert answer("clear", "--yes", "--include-pinned", "--tenant", first, *at)["deleted"] >= 0
    assert {one["tenant"] for one in answer("ls", *at)["data"]} == {second}
    refused = invoke("ls", "--tenant", first, "--url", shared.url, "--api-key", KEYS[0])
    assert refused.exit_code == 1


@pytest.mark.parametrize("name", ["none/x.st", "file/x.st"])
def test_a_file_that_cannot_be_written_is_named(name: str, url: str, tmp_path: Path) -> None:
    """One line with the reason, before the server is asked for anything."""
    (tmp_path / "file").write_text("mine")

    result = invoke("export", "--session", "s", str(tmp_path / name), "--url", url)

    assert result.exit_code == 2
    assert f"FILE='{tmp_path / name}' cannot be written" in result.stderr
    assert [one.name for one in tmp_path.rglob("*")] == ["file"]


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        ("The law.", ["--ttl", "1 week"], "ttl='1 week' is no length of time"),
        ("The law.", ["--ttl", "0"], "ttl='0' keeps nothing"),
        (" \n", [], "is empty"),
        (
            '{"name": "a", "prompt": "A"}\n{"name": "a", "prompt": "B"}',
            [],
            "line 2: a is the name of line 1",
        ),
        (
            '{"name": "a", "prompt": "A"}\n{"name": "b", "prompt": "B", "pin": 1}',
            [],
            "line 2: b: pin=1",
        ),
        ('{"name": "a", "prompt": "A", "messages": []}', [], "messages and prompt are given"),
    ],
)
def test_a_wrong_prompt_to_warm_is_refused_before_any_is_sent(
    text: str, args: list[str], message: str, url: str, tmp_path: Path
) -> None:
    """With the exit code of a wrong request, and the line where it is in a catalogue."""
    path = tmp_path / ("c.jsonl" if text.startswith("{") else "law.txt")
    path.write_text(text)

    result = invoke("warm", str(path), *args, "--url", url)

    assert result.exit_code == 2
    assert message in result.stderr
    assert answer("ls", "--contexts", "--url", url)["data"] == []


def test_the_pin_of_a_context_is_named_to_who_unpins_the_context(url: str) -> None:
    """Its name is not that of the context."""
    warm = invoke("warm", "-", "--name", "law", "--pin", "--url", url, stdin=TEXT)
    assert warm.exit_code == 0, warm.output

    wrong = invoke("unpin", "law", "--url", url)

    assert wrong.exit_code == 1
    assert "the pin of a context law is context:law" in wrong.stderr
    assert invoke("unpin", "context:law", "--url", url).exit_code == 0
    invoke("rm", "--context", "law", "--url", url)
