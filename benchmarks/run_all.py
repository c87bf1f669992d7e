"""Every benchmark, one after the other, and a table of their verdicts."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from benchmarks.harness import RESULTS, BenchmarkError, Result, read
from benchmarks.shapes import SHAPES

# How the budget is divided, in minutes; the rest of it is for models and checks.
NAME_TO_MINUTES = {
    "ledger": 0.5,
    "memory_waste": 3.0,
    "overhead": 1.5,
    "linear": 2.0,
    "attention": 4.0,
    "cached_vs_uncached": 1.5,
    "engine_vs_generate": 3.0,
    "cache_overhead": 3.5,
    "warm_prefix": 4.0,
    "repair": 4.0,
    "format_quality": 5.0,
    "batch32": 11.0,
    "decode": 6.0,
    "prefill_profile": 2.0,
    "tier_speed": 1.0,
    "disk_startup": 1.0,
    "resp_speed": 1.0,
    "offload": 5.0,
    "moves_beside_decode": 2.0,
    "planner_regret": 0.5,
    "planner_real": 4.0,
    "chat_turns": 4.0,
    "server_overhead": 6.0,
    "purge_speed": 2.0,
    "trace_policies": 4.0,
    "context_turns": 2.0,
}
FULL_MINUTES = 85.0
# Scripts that measure a model of a real shape, and so can be asked for another one. The batches of "decode"
# are as large as memory allows in its own shape.
SHAPED = frozenset(NAME_TO_MINUTES) - {
    "ledger", "linear", "attention", "decode", "format_quality", "memory_waste", "overhead",
    "tier_speed", "disk_startup", "resp_speed", "planner_regret", "planner_real", "trace_policies",
    "context_turns",
}  # fmt: skip
_LEGEND = (
    "Medians, with the 10th to the 90th percentile in brackets, or the extremes where there are fewer than "
    "ten. What else was measured, and how, is in the results files."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What became of one benchmark: its result, or why there is none."""

    name: str
    result: Result | None
    failure: str | None


def main(argv: Sequence[str] | None = None) -> list[Entry]:
    """Run all benchmarks in this process, so that models are built once; write summary.md.

    A script that is not asked for keeps its last result there. Results of another shape than the usual one
    have a folder of their own.
    """
    options = _parse(argv)
    share = options.budget_minutes / FULL_MINUTES
    folder = options.results or (RESULTS / options.shape if options.shape else RESULTS)
    start, entries = perf_counter(), []
    for name, minutes in NAME_TO_MINUTES.items():
        if options.shape and name not in SHAPED:
            continue
        if options.only is not None and name not in options.only:
            earlier = None if options.quick else read(name, folder)
            entries.append(Entry(name=name, result=earlier, failure="not asked for"))
            continue
        arguments = [f"--budget={60 * minutes * share:g}", f"--threads={options.threads}"]
        arguments += ["--quick"] if options.quick else []
        arguments += [f"--set=shape={options.shape}"] if options.shape else []
        arguments += [f"--results={folder}"] if options.results or options.shape else []
        entries.append(_run(name, arguments))
    took_s = perf_counter() - start
    text = summary(entries, took_s)
    print(text)
    if options.results is not None or not options.quick:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.md").write_text(text + "\n", encoding="utf-8")
    return entries


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the scripts")
    parser.add_argument("--budget-minutes", type=float, default=FULL_MINUTES)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, help="folder of the results")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=sorted(NAME_TO_MINUTES),
        help="run these only; without names, make the summary of the last results anew",
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="another model shape than the usual one"
    )
    return parser.parse_args(argv)


def _run(name: str, arguments: list[str]) -> Entry:
    print(f"== {name}", flush=True)
    try:
        script = importlib.import_module(f"benchmarks.{name}").main
        return Entry(name=name, result=script(arguments), failure=None)
    except BenchmarkError as error:
        return Entry(name=name, result=None, failure=str(error))
    except Exception as error:  # noqa: BLE001  one that fails must not hide the others' results
        traceback.print_exc(file=sys.stdout)
        return Entry(name=name, result=None, failure=f"{type(error).__name__}: {error}")


def summary(entries: Sequence[Entry], took_s: float) -> str:
    """The verdicts as a table in Markdown; what did not run is in it too."""
    lines = ["# Benchmarks", ""]
    results = [entry.result for entry in entries if entry.result is not None]
    if results:
        one = results[0]
        flags = ", ".join(name for name, has in one.machine["flags"].items() if has)
        lines += [
            f"{one.machine['cpu']}, {one.machine['cores']} cores ({flags}), "
            f"{one.machine['ram_gb']} GB; {one.threads} threads; "
            + ", ".join(f"{name} {version}" for name, version in results[-1].versions.items())
            + f"; this run took {took_s / 60:.1f} minutes.",
            "",
            _LEGEND,
            "",
        ]
    lines += [
        "| claim | measured | target | holds | command | commit |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        lines += _rows(entry)
    return "\n".join(lines)


def _rows(entry: Entry) -> list[str]:
    if entry.result is None:
        return [f"| {entry.name} | did not run: {entry.failure} | | no | | |"]
    result = entry.result
    with_target = [finding for finding in result.findings if finding.target is not None]
    return [
        f"| {one.what} | {one.median:.4g} {one.unit} [{one.low:.4g} .. {one.high:.4g}, n={one.count}] | "
        f"{one.target or ''} | {'' if one.holds is None else 'yes' if one.holds else 'no'} | "
        f"`{result.command}` | {(result.commit or 'unknown')[:8]}{'+' if result.is_modified else ''} |"
        for one in with_target or result.findings
    ]


if __name__ == "__main__":
    main()
