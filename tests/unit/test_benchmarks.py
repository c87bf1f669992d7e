"""Every benchmark runs on tiny sizes, checks before it measures, and writes what a reader needs."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import run_all
from benchmarks.harness import BenchmarkError, Paired, Result, Run, alternate
from kvkeep.native import KernelsAbsent, load_kernels

NAMES = sorted(
    path.stem
    for path in Path(run_all.__file__).parent.glob("*.py")
    if "Script(" in path.read_text(encoding="utf-8") and path.stem != "harness"
)
NEEDS_KERNELS = {"attention", "linear"}
REQUIRED = {field.name for field in fields(Result)}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A benchmark sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_runs_and_writes_its_result(name: str, tmp_path: Path) -> None:
    """The script checks both sides, finds something, and its file says how it was made."""
    kernels = load_kernels()
    if name in NEEDS_KERNELS and isinstance(kernels, KernelsAbsent):
        pytest.skip(f"no kernels: {kernels.reason}")
    with warnings.catch_warnings():
        # The other side's code is not ours to keep silent.
        warnings.simplefilter("default")
        result = import_module(f"benchmarks.{name}").main(
            ["--quick", "--threads", "1", "--results", str(tmp_path)]
        )
    written = json.loads((tmp_path / f"{name}.json").read_text())

    assert written.keys() == REQUIRED
    assert written["name"] == name
    assert written["is_quick"]
    assert str(tmp_path) not in written["command"]
    assert result.checks
    assert {"what", "unit", "median", "low", "high", "target", "holds"} <= written["findings"][
        0
    ].keys()
    assert all(one["low"] <= one["median"] <= one["high"] for one in written["findings"])


def test_all_benchmarks_are_run_together() -> None:
    """What is a benchmark has its share of the budget."""
    assert sorted(run_all.NAME_TO_MINUTES) == NAMES
    assert sum(run_all.NAME_TO_MINUTES.values()) < run_all.FULL_MINUTES


def test_the_summary_names_what_did_not_run(tmp_path: Path) -> None:
    """A benchmark that was left out or failed is in the table with the reason."""
    entries = run_all.main(["--quick", "--only", "ledger", "--results", str(tmp_path)])
    text = (tmp_path / "summary.md").read_text()

    assert len(entries) == len(NAMES)
    assert "| batch32 | did not run: not asked for |" in text
    assert "cold request of 1024 tokens" in text


def test_a_summary_is_made_anew_without_running_anything(tmp_path: Path) -> None:
    """What was measured before is read from its files; what never was says so."""
    run_all.main(["--quick", "--only", "ledger", "--results", str(tmp_path)])

    entries = run_all.main(["--only", "--results", str(tmp_path)])

    assert [entry.name for entry in entries if entry.result is not None] == ["ledger"]
    assert "cold request of 1024 tokens" in (tmp_path / "summary.md").read_text()


def test_another_shape_is_measured_by_the_scripts_that_have_one(tmp_path: Path) -> None:
    """The shape reaches the script, and scripts without a model are left out."""
    options = ["--quick", "--shape", "thin", "--only", "warm_prefix", "--results", str(tmp_path)]
    entries = {entry.name: entry for entry in run_all.main(options)}

    assert entries.keys() == run_all.SHAPED
    result = entries["warm_prefix"].result
    assert result is not None
    assert result.settings["shape"] == "thin"


def test_sides_take_turns() -> None:
    """A pair is measured side by side, the second side first in every other round."""
    calls: list[tuple[str, int]] = []

    def side(name: str, seconds: float) -> float:
        calls.append((name, len(calls)))
        return seconds

    paired = alternate(lambda n: side("a", 1.0 + n), lambda n: side("b", 2.0), rounds=2, warmups=1)

    assert [name for name, _ in calls] == ["a", "b", "b", "a", "a", "b"]
    assert paired == Paired([2.0, 3.0], [2.0, 2.0])
    assert paired.second_over_first() == [1.0, 2 / 3]


def test_a_spent_budget_leaves_rounds_out() -> None:
    """The least number of rounds is always run, and no more once the budget is spent."""
    paired = alternate(lambda _: 1.0, lambda _: 1.0, rounds=100, budget_s=0.0, at_least=4)

    assert len(paired.first_s) == 4


def test_sides_that_differ_give_no_ratio() -> None:
    """A check that fails ends the benchmark."""
    run = Run(seed=0, threads=1, is_quick=True)

    with pytest.raises(BenchmarkError, match="both sides agree"):
        run.check("both sides agree", holds=False)


def test_a_target_is_held_by_the_median() -> None:
    """At least and at most are compared with the median of all pairs."""
    run = Run(seed=0, threads=1, is_quick=True)
    run.add("ratio", [9.0, 7.0, 8.0], "times", at_least=8)
    run.add("share", [0.1, 0.3, 0.3], "share", at_most=0.2)

    assert [(one.median, one.target, one.holds) for one in run.findings] == [
        (8.0, ">= 8", True),
        (0.3, "<= 0.2", False),
    ]
