"""kvkeep beside transformers, OpenVINO GenAI, llama.cpp and vLLM: one table.

make bench-peers                                   everything, about half an hour on two cores
python -m benchmarks.peers.compare --engines openvino llamacpp
python -m benchmarks.peers.compare --points "first token of 512" "decode 1 x 4096"
python -m benchmarks.peers.compare --quick         tiny sizes, kvkeep and transformers only
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import psutil

from benchmarks.harness import RESULTS
from benchmarks.peers.crew import Crew
from benchmarks.peers.engines import ENGINES, FIELDS, ROOT, USUAL
from benchmarks.peers.measuring import Cell, Rounds, measure_point
from benchmarks.peers.plan import Decode, FirstToken, Heat, Point, Stage, Unfit, heats_of
from benchmarks.peers.prepare import NotPreparedError, Prepared, prepare
from benchmarks.peers.report import Report, write_report
from benchmarks.shapes import SHAPES

# Memory that stays free, for the comparison itself and what the system needs.
_RESERVE_BYTES = 3 * 2**29
_QUICK_ENGINES = ("kvkeep", "transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The shape and the points, cheap stages first; openings of a stage fit into one start of the engines."""

    shape: str
    stages: tuple[Stage, ...]
    rounds: Rounds


FULL = Settings(
    shape="llama-1b",
    stages=(
        Stage(
            (
                Decode(1, 512),
                Decode(8, 512),
                FirstToken(0, 512),
                Decode(1, 4096),
                FirstToken(4096, 16),
                Decode(32, 512),
                FirstToken(0, 4096),
                Decode(1, 16384),
            )
        ),
        Stage((Decode(8, 4096), Decode(32, 4096), Decode(8, 16384))),
        Stage((Decode(32, 16384),)),
    ),
    rounds=Rounds(decode=40, first_token=5, at_least=3, warmups=1),
)
QUICK = Settings(
    shape="micro",
    stages=(Stage((Decode(1, 64), Decode(3, 96), FirstToken(0, 40), FirstToken(64, 8))),),
    rounds=Rounds(decode=3, first_token=2, at_least=2, warmups=1),
)


def main(argv: Sequence[str] | None = None) -> Report | None:
    """Prepare what is missing, measure, print the table and write it down; None with --prepare-only."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parse(arguments)
    settings = _chosen(QUICK if options.quick else FULL, options.points)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.quick else options.folder
        prepared, reasons = _prepare(options.engines, settings.shape, folder)
        if options.prepare_only:
            return None
        crew = Crew(
            prepared=prepared, threads=options.threads, logs=folder / "logs", reasons=reasons
        )
        start = perf_counter()
        try:
            cells = measure(crew, settings, options.engines, 60 * options.budget_minutes)
        finally:
            crew.close()
    report = Report(
        command=" ".join(["python -m benchmarks.peers.compare", *_shown(arguments)]),
        threads=options.threads,
        is_quick=options.quick,
        settings=asdict(settings) | {"budget_minutes": options.budget_minutes},
        shape=SHAPES[settings.shape],
        cells=cells,
        facts=crew.facts,
        reference=crew.reference,
        duration_s=perf_counter() - start,
    )
    print(report.markdown())
    if options.results is not None:
        write_report(report, options.results)
    return report


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.compare", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, without other engines")
    parser.add_argument(
        "--engines", nargs="+", choices=sorted(ENGINES), help="only these, and kvkeep beside them"
    )
    parser.add_argument("--points", nargs="+", help="only these, as the table names them")
    parser.add_argument("--budget-minutes", type=float, default=25.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".peers", help="environments and models"
    )
    parser.add_argument("--results", type=Path, help="folder of the results")
    parser.add_argument("--prepare-only", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    usual = _QUICK_ENGINES if options.quick else USUAL
    options.engines = with_ours(options.engines or usual)
    if options.results is None and not options.quick:
        options.results = RESULTS / "peers"
    return options


def _chosen(settings: Settings, labels: Sequence[str] | None) -> Settings:
    """The settings with the named points only; exits where a name is unknown."""
    if labels is None:
        return settings
    known = {point.label for stage in settings.stages for point in stage.points}
    unknown = sorted(set(labels) - known)
    if unknown:
        sys.exit(f"--points has {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    stages = [
        Stage(tuple(point for point in stage.points if point.label in labels))
        for stage in settings.stages
    ]
    return replace(settings, stages=tuple(stage for stage in stages if stage.points))


def with_ours(names: Sequence[str]) -> tuple[str, ...]:
    """The engines, with kvkeep in the formats in which it is compared with them."""
    ours = [field.ours for field in FIELDS if {field.ours, *field.peers} & set(names)]
    return tuple(dict.fromkeys([*ours, *names]))


def _shown(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that name folders of this machine."""
    shown, is_folder = [], False
    for argument in arguments:
        is_name = argument in ("--results", "--folder")
        if not is_folder and not is_name and not argument.startswith(("--results=", "--folder=")):
            shown.append(argument)
        is_folder = is_name
    return shown


def _prepare(
    names: Sequence[str], shape: str, folder: Path
) -> tuple[dict[str, Prepared], dict[str, str]]:
    prepared, reasons = {}, {}
    for name in names:
        try:
            prepared[name] = prepare(name, shape, folder)
        except NotPreparedError as error:
            reasons[name] = str(error)
            print(f"{name}: {error}", flush=True)
    return prepared, reasons


def measure(crew: Crew, settings: Settings, engines: Sequence[str], budget_s: float) -> list[Cell]:
    """Heat by heat, point by point, each with its share of the time that is left."""
    free_bytes = psutil.virtual_memory().available - _RESERVE_BYTES
    heats = heats_of(settings.stages, engines, SHAPES[settings.shape], free_bytes)
    start, cells = perf_counter(), list[Cell]()
    left = sum(point.shares for heat in heats for point in _points(heat) if isinstance(heat, Heat))
    for heat in heats:
        if isinstance(heat, Unfit):
            cells += [_unmeasured(heat.field.name, point, heat.peer, heat.field.ours, heat.reason)
                      for point in _points(heat)]  # fmt: skip
            continue
        for point in _points(heat):
            rest_s = budget_s - (perf_counter() - start)
            share_s, left = rest_s * point.shares / left, left - point.shares
            if rest_s <= 0:
                reason = f"the {budget_s / 60:.0f} minutes were over"
                cells += [
                    _unmeasured(heat.field.name, point, name, heat.field.ours, reason)
                    for name in heat.engines
                ]
                continue
            crew.man(heat)
            print(f"{heat.field.name}, {point.label}: {', '.join(heat.engines)}", flush=True)
            found = measure_point(
                crew, heat, point, settings.rounds, budget_s=share_s, rest_s=rest_s
            )
            _print(found)
            cells += found
    return cells


def _points(heat: Heat | Unfit) -> list[Point]:
    points = heat.stage.points
    return [p for p in points if isinstance(p, Decode) or heat.field.has_first_tokens]


def _unmeasured(field: str, point: Point, engine: str, ours: str, reason: str) -> Cell:
    return Cell(field_name=field, point=point.label, engine=engine, ours=ours, reason=reason)


def _print(cells: Sequence[Cell]) -> None:
    for cell in cells:
        print(f"  {cell.engine}: {cell.summary()}", flush=True)


if __name__ == "__main__":
    main()
