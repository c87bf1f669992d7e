"""One point of the table, measured on the engines that are alive."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

from benchmarks.peers.crew import Crew
from benchmarks.peers.plan import Decode, FirstToken, Heat, Point
from benchmarks.peers.protocol import EITHER, ONE, OWN, RefusalError
from benchmarks.peers.turns import take_turns
from benchmarks.peers.worker_process import WorkerError

__all__ = ["Cell", "Rounds", "measure_point"]

Side = Callable[[int], float]

# Steps of the slowest engines take seconds; one that takes this long has hung.
_STEP_TIMEOUT_S = 240.0
# Of a point's time, what may go into filling the contexts of the peers that compute them.
_FILLING_SHARE = 0.6
# What cannot be divided may take longer than its share, up to this.
_MOST_ONE_S = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """How often the sides of a point take turns, at most and at least; warm-ups come before."""

    decode: int
    first_token: int
    at_least: int
    warmups: int


@dataclass(kw_only=True, slots=True)
class Cell:
    """What was found for one engine at one point; without `seconds` there is a `reason`.

    `over_ours` are its seconds over those of kvkeep in the same round: more than 1 is slower than kvkeep.
    """

    field_name: str
    point: str
    engine: str
    ours: str
    seconds: list[float] = field(default_factory=list)
    over_ours: list[float] = field(default_factory=list)
    how: str = ""
    is_shared: bool = False
    kv_bytes: int | None = None
    num_tokens: int = 0
    resident_bytes: int | None = None
    reason: str | None = None

    def summary(self) -> str:
        """One line for a terminal."""
        if not self.seconds:
            return f"not measured: {self.reason}"
        times = f", {median(self.over_ours):.2f}x" if self.over_ours else ""
        return f"{1000 * median(self.seconds):.4g} ms{times}, n={len(self.seconds)} ({self.how})"


@dataclass(frozen=True, slots=True)
class _Sitting:
    """The engines of a heat at one point, and the time for it."""

    crew: Crew
    heat: Heat
    rounds: Rounds
    budget_s: float
    rest_s: float

    def cell(self, name: str, point: Point) -> Cell:
        return Cell(
            field_name=self.heat.field.name,
            point=point.label,
            engine=name,
            ours=self.heat.field.ours,
        )

    def fill_limit_s(self) -> float:
        """Seconds in which each engine that computes its contexts may do so."""
        facts = self.crew.facts
        slow = [n for n in self.heat.engines if n in facts and facts[n].fills == "prefill"]
        return _FILLING_SHARE * self.budget_s / max(1, len(slow))

    def most_s(self, share_s: float) -> float:
        """Seconds for what cannot be divided: one context, or one prompt."""
        return max(share_s, min(_MOST_ONE_S, self.rest_s / 4))


def measure_point(
    crew: Crew, heat: Heat, point: Point, rounds: Rounds, *, budget_s: float, rest_s: float
) -> list[Cell]:
    """A cell for each engine of the heat: a measured one, or one that says why not.

    `budget_s` is the point's share of the `rest_s` that are left for all points.
    """
    sitting = _Sitting(crew, heat, rounds, budget_s, rest_s)
    name_to_cell = {name: sitting.cell(name, point) for name in heat.engines}
    for name, cell in name_to_cell.items():
        if name not in crew.workers:
            cell.reason = crew.reasons.get(name, "not running")
    if isinstance(point, Decode):
        _measure_decode(sitting, point, name_to_cell)
    else:
        _measure_first_token(sitting, point, name_to_cell)
    ours = name_to_cell[heat.field.ours]
    for cell in name_to_cell.values():
        if not cell.seconds and cell.reason is None:
            cell.reason = f"kvkeep: {ours.reason}" if ours.reason else "no peer to compare with"
    return list(name_to_cell.values())


def _measure_decode(sitting: _Sitting, point: Decode, cells: Mapping[str, Cell]) -> None:
    """Peers first: whether their requests share a context decides what kvkeep's do."""
    ours, start = sitting.heat.field.ours, perf_counter()
    peers = [name for name in sitting.heat.peers if _open(sitting, point, cells[name], EITHER)]
    kinds = sorted({cells[name].is_shared for name in peers})
    for num_left, is_shared in zip(range(len(kinds), 0, -1), kinds, strict=True):
        if not _open(sitting, point, cells[ours], ONE if is_shared else OWN):
            break
        rest_s = sitting.budget_s - (perf_counter() - start)
        now = [name for name in peers if cells[name].is_shared == is_shared]
        sides = {name: _step_of(sitting.crew, name) for name in [ours, *now]}
        _race(sitting, cells, sides, rounds=sitting.rounds.decode, budget_s=rest_s / num_left)
        _close(sitting.crew, ours)
    for name in peers:
        _close(sitting.crew, name)


def _open(sitting: _Sitting, point: Decode, cell: Cell, sharing: str) -> bool:
    if cell.reason is not None:
        return False
    limit_s = sitting.fill_limit_s()
    most_s = sitting.most_s(limit_s)
    try:
        answer = sitting.crew.ask(
            cell.engine,
            "open",
            timeout_s=3 * most_s + _STEP_TIMEOUT_S,
            batch=point.batch,
            context=point.context,
            # No context is the beginning of another point's.
            seed=1_000_003 * point.batch + point.context,
            limit_s=limit_s,
            most_s=most_s,
            sharing=sharing,
        )
    except (RefusalError, WorkerError) as error:
        cell.reason = str(error)
        return False
    cell.how, cell.is_shared = answer["how"], answer["is_shared"]
    cell.resident_bytes = answer["resident_bytes"]
    if not cell.is_shared:
        cell.kv_bytes, cell.num_tokens = answer["kv_bytes"], point.batch * point.context
    return True


def _close(crew: Crew, name: str) -> None:
    try:
        crew.ask(name, "close")
    except WorkerError:
        return  # it is ended, and the next point says why


def _step_of(crew: Crew, name: str) -> Side:
    return lambda _number: float(crew.ask(name, "step", timeout_s=_STEP_TIMEOUT_S)["seconds"])


def _measure_first_token(sitting: _Sitting, point: FirstToken, cells: Mapping[str, Cell]) -> None:
    crew, sides = sitting.crew, {}
    for name, cell in cells.items():
        if cell.reason is not None:
            continue
        facts = crew.facts[name]
        num_computed = 0 if point.prefix and facts.fills == "random" else point.prefix + point.new
        least_s = num_computed / (facts.tokens_per_s or float("inf"))
        limit_s = sitting.most_s(sitting.budget_s / 2)
        if least_s > limit_s:
            cell.reason = f"it would take {least_s:.0f} s, {limit_s:.0f} s were given"
        elif _warm(sitting, point, cell):
            sides[name] = _first_token_of(sitting, name, point)
    rounds = sitting.rounds.first_token
    _race(sitting, cells, sides, rounds=rounds, budget_s=sitting.budget_s, warmups=0, at_least=1)
    for name in sides:
        if cells[name].seconds and not point.prefix:
            crew.facts[name].tokens_per_s = point.new / min(cells[name].seconds)


def _warm(sitting: _Sitting, point: FirstToken, cell: Cell) -> bool:
    if not point.prefix:
        return True
    timeout_s = _STEP_TIMEOUT_S + sitting.budget_s
    try:
        answer = sitting.crew.ask(
            cell.engine, "warm", timeout_s=timeout_s, parts=_prefix(sitting.heat, point)
        )
    except (RefusalError, WorkerError) as error:
        cell.reason = str(error)
        return False
    cell.how = answer["how"]
    return True


def _first_token_of(sitting: _Sitting, name: str, point: FirstToken) -> Side:
    """Each prompt is new: to kvkeep also the ones that it meets in another heat."""
    timeout_s = _STEP_TIMEOUT_S + sitting.budget_s

    def side(number: int) -> float:
        seed = ("new", sitting.heat.peers, point.prefix, point.new, number)
        parts = [*_prefix(sitting.heat, point), (seed, point.new)]
        answer = sitting.crew.ask(name, "first_token", timeout_s=timeout_s, parts=parts)
        return float(answer["seconds"])

    return side


def _prefix(heat: Heat, point: FirstToken) -> list[tuple[object, int]]:
    return [(("prefix", heat.peers), point.prefix)] if point.prefix else []


def _race(
    sitting: _Sitting,
    cells: Mapping[str, Cell],
    sides: Mapping[str, Side],
    *,
    rounds: int,
    budget_s: float,
    warmups: int | None = None,
    at_least: int | None = None,
) -> None:
    """Let the sides take turns; when one fails, the others start again without it."""
    ours, remaining = sitting.heat.field.ours, dict(sides)
    for attempt in range(len(sides)):
        if ours not in remaining or len(remaining) == 1:
            return
        try:
            found = take_turns(
                # What a side was asked before is not new to it.
                {name: _later(side, 1000 * attempt) for name, side in remaining.items()},
                rounds=rounds,
                warmups=sitting.rounds.warmups if warmups is None else warmups,
                budget_s=budget_s,
                at_least=sitting.rounds.at_least if at_least is None else at_least,
            )
        except (RefusalError, WorkerError) as error:
            for name in [name for name in remaining if name not in sitting.crew.workers]:
                cells[name].reason = str(error)
                del remaining[name]
        else:
            _record(cells, found, ours)
            return


def _later(side: Side, offset: int) -> Side:
    return lambda number: side(number + offset)


def _record(cells: Mapping[str, Cell], found: Mapping[str, Sequence[float]], ours: str) -> None:
    # What kvkeep takes with a shared context is in the ratios only, where it has times without.
    name_to_seconds = {name: list(seconds) for name, seconds in found.items()}
    for name, seconds in name_to_seconds.items():
        if name != ours:
            pairs = zip(seconds, found[ours], strict=True)
            cells[name].over_ours = [theirs / own for theirs, own in pairs]
        if not cells[name].seconds:
            cells[name].seconds = seconds
