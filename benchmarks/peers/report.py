"""The table: a row for each point, a column for each engine, and below it why a cell is empty."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Result, Run
from benchmarks.machine import commit, machine_facts, versions
from benchmarks.peers.crew import Facts
from benchmarks.peers.engines import ENGINES, FIELDS, RIVALS
from benchmarks.peers.measuring import Cell
from benchmarks.shapes import Shape

__all__ = ["Report", "write_report"]

CLAIM = "kvkeep decodes no slower than OpenVINO GenAI and llama.cpp with K/V of equal precision."
_LEGEND = (
    "Median time of one step, or to the first token. In brackets how many times longer than kvkeep, the "
    "median over pairs that were measured one right after the other: above 1 kvkeep is faster."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What was found, and what a reader needs to judge it."""

    command: str
    threads: int
    is_quick: bool
    settings: dict[str, Any]
    shape: Shape
    cells: list[Cell]
    facts: Mapping[str, Facts]
    reference: str | None
    duration_s: float

    def result(self) -> Result:
        """The same in the form of the other benchmarks."""
        run = Run(seed=0, threads=self.threads, is_quick=self.is_quick)
        self._add_checks(run)
        for cell in self.cells:
            self._add(run, cell)
        return Result(
            name="peers",
            claim=CLAIM,
            command=self.command,
            **commit(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine_facts(),
            versions=versions() | {name: one.versions for name, one in self.facts.items()},
            threads=self.threads,
            seed=0,
            is_quick=self.is_quick,
            settings=self.settings,
            checks=run.checks,
            findings=run.findings,
            floors=run.floors,
            notes=self.notes(),
            duration_s=round(self.duration_s, 1),
            holds=bool(run.findings) and all(one.holds is not False for one in run.findings),
        )

    def _add_checks(self, run: Run) -> None:
        for name, one in self.facts.items():
            if one.agreement is not None:
                run.checks.append(f"{name}: {self._agreement(name)}")

    def _add(self, run: Run, cell: Cell) -> None:
        what = f"{cell.field_name}, {cell.point}"
        if cell.seconds:
            run.add(f"{what}: {cell.engine}", cell.seconds, "s")
        if cell.over_ours:
            least = 1.0 if cell.engine in RIVALS else None
            run.add(f"{what}: {cell.engine} over kvkeep", cell.over_ours, "times", at_least=least)

    def notes(self) -> list[str]:
        """Why cells are empty, and what was shared."""
        what_to_points: dict[str, list[str]] = {}
        for cell in self.cells:
            who = f"{ENGINES[cell.engine].label}, {cell.field_name}"
            if cell.reason is not None:
                what = f"{who}: not measured: {cell.reason}"
            elif cell.is_shared and cell.engine != cell.ours:
                what = f"{who}: its requests share one context, and so do kvkeep's beside it"
            else:
                continue
            what_to_points.setdefault(what, []).append(cell.point)
        return [
            f"{what} ({', '.join(dict.fromkeys(points))})"
            for what, points in what_to_points.items()
        ]

    def markdown(self) -> str:
        """The table and its notes."""
        machine = machine_facts()
        flags = ", ".join(flag for flag, has in machine["flags"].items() if has)
        where = (
            f"{machine['cpu']}, {machine['cores']} cores ({flags}), {machine['ram_gb']} GB; "
            f"{self.threads} threads; random weights in the shape {self.shape.name}; "
            f"{self.duration_s / 60:.0f} minutes; `{self.command}`."
        )
        lines = ["# kvkeep beside other engines", "", where, "", _LEGEND, ""]
        labels = list(dict.fromkeys(ENGINES[cell.engine].label for cell in self.cells))
        lines += [f"| | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
        for name in dict.fromkeys(field.name for field in FIELDS):
            lines += self._rows(name, labels)
        versions_of = {ENGINES[name].label: one.versions for name, one in self.facts.items()}
        lines.append(_row("version", labels, versions_of))
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes()), ""])

    def _rows(self, field: str, labels: Sequence[str]) -> list[str]:
        cells = [cell for cell in self.cells if cell.field_name == field]
        if not cells:
            return []
        engines = {ENGINES[cell.engine].label: cell.engine for cell in cells}
        rows = []
        for point in dict.fromkeys(cell.point for cell in cells):
            label_to_cells = {
                label: [c for c in cells if c.point == point and ENGINES[c.engine].label == label]
                for label in labels
            }
            rows.append((f"{point}, {field}", {k: _shown(v) for k, v in label_to_cells.items()}))
        for what, of_engine in (
            (f"K/V memory of a token, {field}", self._memory),
            (f"same tokens as {self.reference}, {field}", self._agreement),
            (f"precision, {field}", lambda name: self.facts[name].precision),
        ):
            known = {
                label: of_engine(name) for label, name in engines.items() if name in self.facts
            }
            rows.append((what, known))
        return [_row(what, labels, shown) for what, shown in rows]

    def _memory(self, name: str) -> str:
        """The least and the most of all points at which requests have contexts of their own."""
        mine = [
            cell.kv_bytes / cell.num_tokens / 1024
            for cell in self.cells
            if cell.engine == name and cell.kv_bytes is not None
        ]
        return f"{min(mine):.1f} to {max(mine):.1f} KiB" if mine else ""

    def _agreement(self, name: str) -> str:
        one = self.facts[name].agreement
        if one is None:
            return "the reference" if name == self.reference else ""
        return f"{one.num_equal} of {one.num_compared}"


def _row(what: str, labels: Sequence[str], label_to_text: Mapping[str, str]) -> str:
    return f"| {what} | {' | '.join(label_to_text.get(label, '') for label in labels)} |"


def _shown(cells: Sequence[Cell]) -> str:
    seconds = [s for cell in cells for s in cell.seconds]
    if not seconds:
        return "–" if cells else ""
    ratios = [ratio for cell in cells for ratio in cell.over_ours]
    times = f" ({median(ratios):.2f}x)" if ratios else ""
    mark = "*" if any(cell.is_shared for cell in cells if cell.engine != cell.ours) else ""
    return f"{_time(median(seconds))}{times}{mark}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def write_report(report: Report, folder: Path) -> None:
    """Write `peers.json`, with every measured time, and `peers.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = asdict(report.result()) | {"cells": [asdict(cell) for cell in report.cells]}
    (folder / "peers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "peers.md").write_text(report.markdown(), encoding="utf-8")
