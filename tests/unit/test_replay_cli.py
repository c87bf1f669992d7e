"""`kvkeep bench trace` reads or makes a trace, and prints what a cache would have found."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli import bench as bench_module
from kvkeep.cli.main import main
from kvkeep.replay import WORKLOADS, read_trace

SMALL = ("--generate", "agent", "--requests", "60", "--bytes-per-token", "100")


def invoke(*args: str) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, ["bench", "trace", *args])


def runs(*args: str) -> list[dict[str, Any]]:
    """The runs of a report as JSON."""
    result = invoke(*args, "--json")
    assert result.exit_code == 0, result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)["runs"]
    return found


def test_a_trace_is_made_and_replayed(tmp_path: Path) -> None:
    """What is written to a file is what is replayed without one."""
    path = tmp_path / "agent.jsonl"
    made = invoke(*SMALL, "--output", str(path))
    from_file = runs(str(path), "--capacities", "20MB", "--bytes-per-token", "100")
    at_once = runs(*SMALL, "--capacities", "20MB")

    assert made.exit_code == 0
    assert made.stdout == ""
    assert "60 requests written" in made.stderr
    assert len(read_trace(path)) == 60
    assert from_file[0]["hits"] == at_once[0]["hits"] > 0


def test_every_size_is_replayed_with_every_policy() -> None:
    """Runs come by size and then by policy, each beside what is possible at its size."""
    found = runs(*SMALL, "--capacities", "5MB,40MB", "--policies", "lru,gdsf")

    assert [(one["settings"]["capacity_bytes"], one["settings"]["policy"]) for one in found] == [
        (5_000_000, "lru"),
        (5_000_000, "gdsf"),
        (40_000_000, "lru"),
        (40_000_000, "gdsf"),
    ]
    assert found[0]["optimum_hits"] == found[1]["optimum_hits"] < found[2]["optimum_hits"]
    assert all(0 < one["hits"] <= one["optimum_hits"] <= one["ideal_hits"] for one in found)


def test_tables_have_a_line_for_each_place() -> None:
    """Without --json the same is in tables, with what the numbers are of."""
    result = CliRunner().invoke(
        main,
        [
            "bench",
            "trace",
            *SMALL,
            "--capacities",
            "15MB",
            "--tier",
            "host:20MB",
            "--tier",
            "disk:1GB",
        ],
        env={"COLUMNS": "200"},
    )

    assert result.exit_code == 0, result.stderr
    assert "agent, 60 requests, seed 0: found in all places together" in result.stdout
    for words in (
        "device",
        "host 20 MB",
        "disk 1 GB",
        "look-ups of blocks of 51.2 KB",
        "unbounded",
    ):
        assert words in result.stdout


def test_bytes_of_a_token_may_be_those_of_a_model() -> None:
    """The bundled model: as many bytes as its K/V take."""
    (found,) = runs(
        "--generate", "chat", "--requests", "5", "--model", "tiny", "--capacities", "1GB"
    )

    assert found["settings"]["bytes_per_token"] % 8 == 0
    assert found["settings"]["bytes_per_token"] != bench_module._BYTES_PER_TOKEN


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either FILE or --generate"),
        (("some.jsonl", "--generate", "chat"), "give either FILE or --generate"),
        (("some.jsonl", "-o", "other.jsonl"), "--output goes with --generate"),
        (("none.jsonl",), "none.jsonl' cannot be read"),
        ((*SMALL, "--capacities", "10%"), "capacities='10%' is a share of nothing"),
        ((*SMALL, "--capacities", "1"), "is less than one block"),
        ((*SMALL, "--policies", "mru"), "policy='mru' is not known"),
        ((*SMALL, "--tier", "host"), "tier='host' is no tier"),
    ],
)
def test_wrong_use_says_so(args: tuple[str, ...], message: str) -> None:
    """The exit code is that of wrong usage, and nothing is on stdout."""
    result = invoke(*args)

    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_the_choices_are_the_workloads_there_are() -> None:
    """The command names them without loading them."""
    assert tuple(WORKLOADS) == bench_module._WORKLOADS


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_number_is_cut(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a pipe, which has no width, nor in a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    tiers = ("--tier", "host:1GB")

    result = invoke(*SMALL, *tiers, "--capacities", "20MB")

    assert result.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout
    for column in ("of unbounded", "prefixes", "policy time", "look-ups/s", "written"):
        assert column in result.stdout


def test_known_policies_are_named_once() -> None:
    """However far the name is from all of them."""
    result = invoke(*SMALL, "--policies", "foo")

    assert result.exit_code == 2
    assert result.stderr.count("s3fifo") == 1
