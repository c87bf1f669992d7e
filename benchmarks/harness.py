"""What every benchmark shares: alternating measurements, checks before numbers, and results as files."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from benchmarks.machine import Rates, commit, machine_facts, measure_rates, versions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["BenchmarkError", "Finding", "Paired", "Result", "Run", "Script", "alternate", "timed"]

RESULTS = Path(__file__).resolve().parent / "results"

Side = Callable[[int], float | None]


class BenchmarkError(Exception):
    """Both sides did not compute the same, so that no ratio between them means anything."""


S = TypeVar("S", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of two sides; entry `i` of both was measured one right after the other."""

    first_s: list[float]
    second_s: list[float]

    def second_over_first(self) -> list[float]:
        """How many times longer the second side took, pair by pair."""
        return [b / a for a, b in zip(self.first_s, self.second_s, strict=True)]

    def first_over_second(self) -> list[float]:
        """How many times longer the first side took, pair by pair."""
        return [a / b for a, b in zip(self.first_s, self.second_s, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = perf_counter()
    work()
    return perf_counter() - start


def alternate(
    first: Side,
    second: Side,
    *,
    rounds: int,
    warmups: int = 1,
    budget_s: float = float("inf"),
    at_least: int = 3,
    flips: bool = True,
) -> Paired:
    """Run both sides in turn and time them; `flips` lets the second go first in every other round.

    A side gets the number of the round, warm-ups included, and may return the seconds that count; else its
    whole time counts. When `budget_s` is spent, rounds after the first `at_least` are left out.
    """
    start, paired = perf_counter(), Paired([], [])
    for number in range(warmups + rounds):
        sides = {"first": first, "second": second}
        order = ["second", "first"] if flips and number % 2 else ["first", "second"]
        seconds = {name: _time(sides[name], number) for name in order}
        if number >= warmups:
            paired.first_s.append(seconds["first"])
            paired.second_s.append(seconds["second"])
        if len(paired.first_s) >= at_least and perf_counter() - start > budget_s:
            break
    return paired


def _time(side: Side, number: int) -> float:
    start = perf_counter()
    own = side(number)
    return perf_counter() - start if own is None else own


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One measured quantity: median and spread (10th to 90th percentile), and its target if it has one."""

    what: str
    unit: str
    median: float
    low: float
    high: float
    count: int
    target: str | None
    holds: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Everything that a results file says."""

    name: str
    claim: str
    command: str
    commit: str | None
    is_modified: bool | None
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    threads: int
    seed: int
    is_quick: bool
    settings: dict[str, Any]
    checks: list[str]
    findings: list[Finding]
    floors: dict[str, Any]
    notes: list[str]
    duration_s: float
    holds: bool


@dataclass(kw_only=True, slots=True)
class Run:
    """A measurement under way: collects checks, findings, floors and notes."""

    seed: int
    threads: int
    is_quick: bool
    budget_s: float = float("inf")
    checks: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    floors: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _rates: Rates | None = None

    def check(self, what: str, *, holds: bool, found: object = "") -> None:
        """Record that both sides agree; raises BenchmarkError when they do not."""
        if not holds:
            raise BenchmarkError(f"not so: {what} {found}")
        self.checks.append(f"{what} {found}".strip())

    def add(
        self,
        what: str,
        values: Sequence[float],
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> float:
        """Record a quantity and return its median; it holds when the median does."""
        middle = median(values)
        target, holds = None, None
        if at_least is not None:
            target, holds = f">= {at_least:g}", middle >= at_least
        elif at_most is not None:
            target, holds = f"<= {at_most:g}", middle <= at_most
        low, high = _spread(values)
        self.findings.append(
            Finding(
                what=what,
                unit=unit,
                median=middle,
                low=low,
                high=high,
                count=len(values),
                target=target,
                holds=holds,
            )
        )
        return middle

    def rates(self) -> Rates:
        """Bandwidth and arithmetic rate of this machine now, measured once."""
        if self._rates is None:
            self._rates = measure_rates(is_quick=self.is_quick)
            self.floors["rates"] = asdict(self._rates)
        return self._rates

    def floor(self, what: str, *, num_bytes: float, operations: float, measured_s: float) -> None:
        """Record how far a measured time is above the least one the machine allows."""
        floor_s = self.rates().floor_s(num_bytes=num_bytes, operations=operations)
        self.floors[what] = {
            "bytes": num_bytes,
            "operations": operations,
            "bytes_over_bandwidth_s": num_bytes / self.rates().read_gb_per_s / 1e9,
            "floor_s": floor_s,
            "measured_s": measured_s,
            "share_of_floor": floor_s / measured_s,
        }


def _spread(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 10:
        return min(values), max(values)
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Script(Generic[S]):
    """A benchmark as a program: its claim, its settings for real and for a try, and what it does."""

    name: str
    claim: str
    full: S
    quick: S
    measure: Callable[[Run, S], None]
    uses_torch: bool = True

    def __call__(self, argv: Sequence[str] | None = None) -> Result:
        """Parse arguments, measure, print a table and write the results file."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        options = self._parse(arguments)
        settings = _changed(self.quick if options.quick else self.full, options.set)
        run = Run(
            seed=options.seed,
            threads=options.threads,
            is_quick=options.quick,
            budget_s=options.budget,
        )
        if self.uses_torch:
            import torch  # the others run where there is none

            torch.set_num_threads(options.threads)
        start = perf_counter()
        self.measure(run, settings)
        result = self._result(run, settings, arguments, perf_counter() - start)
        print(table(result))
        if options.results is not None:
            write(result, options.results)
        return result

    def _parse(self, arguments: list[str]) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.{self.name}", description=self.claim
        )
        names = ", ".join(f.name for f in fields(self.full))
        parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
        parser.add_argument(
            "--budget",
            type=float,
            default=float("inf"),
            help="seconds, after which rounds are left out",
        )
        parser.add_argument(
            "--results", type=Path, help="folder of the results file; with --quick none by default"
        )
        parser.add_argument(
            "--set", action="append", default=[], metavar="NAME=VALUE", help=f"one of: {names}"
        )
        options = parser.parse_args(arguments)
        if options.results is None and not options.quick:
            options.results = RESULTS
        return options

    def _result(self, run: Run, settings: S, arguments: list[str], duration_s: float) -> Result:
        # Where the results go is no part of what was measured.
        shown = [
            a
            for at, a in enumerate(arguments)
            if not a.startswith("--results=")
            and "--results" not in arguments[max(0, at - 1) : at + 1]
        ]
        return Result(
            name=self.name,
            claim=self.claim,
            command=" ".join(["python -m", f"benchmarks.{self.name}", *shown]),
            **commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine_facts(),
            versions=versions(),
            threads=run.threads,
            seed=run.seed,
            is_quick=run.is_quick,
            settings=asdict(settings),
            checks=run.checks,
            findings=run.findings,
            floors=run.floors,
            notes=run.notes,
            duration_s=round(duration_s, 1),
            holds=all(finding.holds is not False for finding in run.findings),
        )


def _changed(settings: S, assignments: Sequence[str]) -> S:
    """The settings with some replaced: `context=1024`, `contexts=[512,1024]`."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        value: Any = text
        with suppress(json.JSONDecodeError):
            value = json.loads(text)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return replace(settings, **changes)


def table(result: Result) -> str:
    """The findings as a table for a terminal."""
    lines = ["", result.claim]
    lines += [f"  checked: {check}" for check in result.checks]
    width = max(len(finding.what) for finding in result.findings)
    for one in result.findings:
        verdict = "" if one.holds is None else ("  holds" if one.holds else "  DOES NOT HOLD")
        target = "" if one.target is None else f"  target {one.target}"
        lines.append(
            f"  {one.what:<{width}}  {one.median:>10.4g} {one.unit:<10} "
            f"[{one.low:.4g} .. {one.high:.4g}, n={one.count}]{target}{verdict}"
        )
    for what, floor in result.floors.items():
        if what != "rates":
            lines.append(
                f"  floor of {what}: {floor['floor_s']:.4g} s, "
                f"{floor['share_of_floor']:.0%} of the measured {floor['measured_s']:.4g} s"
            )
    lines += [f"  note: {note}" for note in result.notes]
    return "\n".join([*lines, f"  took {result.duration_s} s", ""])


def read(name: str, folder: Path) -> Result | None:
    """The result that an earlier run wrote, or None."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return None
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["findings"] = [Finding(**finding) for finding in fields["findings"]]
    return Result(**fields)


def write(result: Result, folder: Path) -> Path:
    """Write the result as `folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return path
