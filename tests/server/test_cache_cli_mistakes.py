"""`kvkeep cache` where something is not as it was thought: a folder, a terminal, a file, an answer."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.llm import LLM
from tests.running_server import RunningServer

TEXT = "Seven bridges cross the river between the mill and the sea. " * 8
SESSION = "conversation-of-anna-smith-2026-11-22-morning"


def invoke(*args: str, stdin: str | None = None) -> Result:
    """Run the program in this process, its output in a pipe."""
    return CliRunner().invoke(main, ["cache", *args], input=stdin)


def in_terminal(*args: str, columns: int) -> str:
    """What the program prints in a real terminal of so many columns."""
    controller, terminal = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb"}
    command = [sys.executable, "-m", "kvkeep.cli.main", "cache", *args]
    done = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(controller, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(controller)
    assert done.wait(60) == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the blocks of a session."""
    found = tmp_path_factory.mktemp("blocks") / "disk"
    with LLM("tiny", capacity="16MB", tiers=[f"disk:{found}:1GB"]) as llm:
        options = CacheOptions(session=SESSION, tags=["document:handbook@v3"])
        llm.generate(TEXT, SamplingParams(max_tokens=1), cache=options)
    return found


@pytest.fixture
def url(server: RunningServer) -> str:
    """The module's server, with that session in it."""
    body = {"prompt": TEXT, "max_tokens": 1, "kv_cache": {"session": SESSION, "tags": ["doc:1"]}}
    with server.client() as client:
        client.post("/v1/completions", json=body).raise_for_status()
    return server.url


@pytest.mark.parametrize(
    "command",
    [
        ["ls", "--folder"], ["stats", "--folder"], ["show", "ab" * 32, "--folder"], ["verify"],
        ["rm", "--tag", "a", "--folder"], ["clear", "--yes", "--folder"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
@pytest.mark.parametrize("content", [[], ["notes.txt"], ["objects/ab/cd"]])
def test_another_folder_is_left_as_it_is(
    command: list[str], content: list[str], tmp_path: Path
) -> None:
    """It is refused by name, and nothing is written into it, not even into one with such a name in it."""
    for name in content:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    result = invoke(*command, str(tmp_path))

    assert result.exit_code == 2, result.output
    assert f"{tmp_path} is no folder of blocks" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_objects_is_still_one_of_blocks(tmp_path: Path) -> None:
    """A tier has had it, and nothing is in it yet."""
    with LLM("tiny", capacity="16MB", tiers=[f"disk:{tmp_path}/disk:1GB"]):
        pass

    assert "nothing is cached" in invoke("ls", "--folder", f"{tmp_path}/disk").stdout
    assert invoke("verify", f"{tmp_path}/disk").exit_code == 0


def test_a_pipe_gets_every_row_whole_and_in_one_line(url: str, folder: Path) -> None:
    """However long names and keys are; what a folder does not know is a dash."""
    blocks = json.loads(invoke("ls", "--blocks", "--url", url, "--json").stdout)["data"]

    lists = [invoke("ls", *args).stdout.splitlines() for args in (
        ["--url", url], ["--folder", str(folder)], ["--blocks", "--url", url],
    )]  # fmt: skip

    for groups in lists[:2]:
        assert [SESSION in line for line in groups] == [False, True]
        assert "None" not in groups[1]
    assert " - " in lists[1][1]
    assert len(lists[2]) == 1 + len(blocks)
    for one, line in zip(blocks, lists[2][1:], strict=True):
        assert line.startswith(one["id"])


def test_a_terminal_of_80_columns_shows_one_line_a_row(url: str) -> None:
    """Names are cut, numbers are not; the digits shown of a key stand for it in other commands."""
    (group,) = json.loads(invoke("ls", "--url", url, "--json").stdout)["data"]

    groups = in_terminal("ls", "--url", url, columns=80).splitlines()
    blocks = in_terminal("ls", "--blocks", "--url", url, columns=80).splitlines()

    assert max(map(len, groups)) <= 80
    assert groups[1].startswith("convers")
    assert "\N{HORIZONTAL ELLIPSIS}" in groups[1]
    assert str(group["blocks"]) in groups[1].split()
    assert "--json" in groups[2]
    shown = blocks[1].split()[0]
    assert max(map(len, blocks)) <= 80
    assert len(shown) == 12
    found = json.loads(invoke("show", shown, "--url", url, "--json").stdout)
    assert found["id"].startswith(shown)
    assert invoke("rm", shown, "--dry-run", "--url", url).exit_code == 0


def test_the_beginning_of_a_key_stands_for_one_block_alone(url: str, folder: Path) -> None:
    """Too short, of no block, or no hex: refused, by a server and of a folder."""
    key = next(iter(folder.glob("objects/*/*"))).name[:64]
    at = ("--folder", str(folder))

    assert json.loads(invoke("show", key[:10], *at, "--json").stdout)["id"] == key
    assert (
        json.loads(invoke("rm", key[:10], "--dry-run", *at, "--json").stdout)["data"][0]["matched"]
        == 1
    )
    for wrong, exit_code in ((key[:7], 2), ("0" * 12, 1), ("xyzxyzxyz", 2), (key + "0", 2)):
        for command in ("show", "rm"):
            assert invoke(command, wrong, *at).exit_code == exit_code
            assert invoke(command, wrong, "--url", url).exit_code == exit_code
    assert invoke("show", "0" * 64, *at).exit_code == 1


def test_a_refused_line_of_a_catalogue_is_named_by_file_and_line(url: str, tmp_path: Path) -> None:
    """The server knows neither; a fault of JSON is named in the same way."""
    lines: list[dict[str, Any]] = [
        {"name": "one", "prompt": "a"},
        {"name": "two", "prompt": "b"},
        {"name": "three", "prompt": "c", "ttl": "soon"},
    ]
    catalogue = tmp_path / "cat.jsonl"
    catalogue.write_text("\n".join(map(json.dumps, lines)))
    refused = invoke("warm", str(catalogue), "--url", url)
    lines[2] = {"name": "three", "token_ids": [2**31]}
    catalogue.write_text("\n".join(map(json.dumps, lines)))
    refused_there = invoke("warm", str(catalogue), "--url", url)
    catalogue.write_text("\n".join([*map(json.dumps, lines[:2]), "{"]))
    malformed = invoke("warm", str(catalogue), "--url", url)

    assert f"error: {catalogue}, line 3: three: ttl='soon'" in refused.stderr
    assert refused.exit_code == 2
    assert f"error: {catalogue}, line 3: three: " in refused_there.stderr
    assert refused_there.exit_code == 1
    assert f"{catalogue}, line 3 is no JSON" in malformed.stderr
    for name in ("one", "two"):
        invoke("rm", "--context", name, "--url", url)


def test_no_is_an_answer(url: str, folder: Path) -> None:
    """It is said calmly that nothing was removed; where nobody answers, how to do without."""
    for at in (["--url", url], ["--folder", str(folder)]):
        refused = invoke("clear", *at, stdin="n\n")
        silent = invoke("clear", *at, stdin="")

        assert refused.exit_code == 1
        assert refused.stderr.splitlines()[-1] == "nothing was removed"
        assert silent.exit_code == 2
        assert silent.stderr.splitlines()[-1] == "nothing was removed; --yes asks no question"
        assert "error" not in refused.stderr + silent.stderr
    assert "nothing is cached" not in invoke("ls", "--url", url).stdout


def test_an_export_of_nothing_writes_no_file(url: str, tmp_path: Path) -> None:
    """The session is known, and none of its blocks is there any more."""
    file = tmp_path / "session.kvkeep"
    invoke("clear", "--yes", "--include-pinned", "--url", url)

    result = invoke("export", str(file), "--session", SESSION, "--url", url)

    assert result.exit_code != 0
    assert result.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_llm_export_of_nothing_is_an_error(tmp_path: Path) -> None:
    """With how many tokens were looked for."""
    with (
        LLM("tiny", capacity="16MB") as llm,
        pytest.raises(ValueError, match="nothing of these 40 tokens is cached"),
    ):
        llm.cache.export(tmp_path / "nothing", [list(range(40))])
    assert list(tmp_path.iterdir()) == []
