"""A world with known costs, in which a plan to load and compute can be carried out without a machine.

The planner predicts times from sums; this runs its plans as events, one after another: tiers deliver objects
in order, and the model computes a run of positions as soon as all before it is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp
from random import Random

from kvkeep.planning.cost import ComputeCost, ComputeFit, LoadCost, LoadFit
from kvkeep.planning.split_plan import MissingBlock, TierLoad
from kvkeep.spec import Span

__all__ = [
    "Noise",
    "World",
    "best_of_all",
    "best_of_family",
    "carry_out",
    "learn",
    "missing_blocks",
]

Sources = tuple[str | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """What things really cost. A step of few tokens costs as if it had up to `wasted_tokens` more."""

    compute: ComputeCost
    loads: Mapping[str, TierLoad]
    step_tokens: int
    wasted_tokens: float = 0.0

    def step_s(self, spans: Sequence[Span]) -> float:
        """Seconds of one step."""
        num_tokens = sum(map(len, spans))
        wasted = 0.0
        if self.wasted_tokens:
            wasted = self.wasted_tokens * (1 - exp(-num_tokens / self.wasted_tokens))
        return self.compute.seconds(spans) + wasted * self.compute.linear_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """What a measurement adds: a factor spread by `sigma`, and now and then one of `outlier`."""

    sigma: float = 0.15
    outlier_share: float = 0.05
    outlier: float = 6.0

    def of(self, seconds: float, chooser: Random) -> float:
        """One measurement of something that takes `seconds`."""
        seconds *= exp(chooser.gauss(0, self.sigma))
        return seconds * (self.outlier if chooser.random() < self.outlier_share else 1)


def missing_blocks(
    start: int, tiers_of_blocks: Sequence[tuple[str, ...]], *, block_size: int, token_bytes: int
) -> list[MissingBlock]:
    """Blocks one after another from position `start`, with the tiers that have each."""
    return [
        MissingBlock(
            Span(start + at * block_size, start + (at + 1) * block_size),
            block_size * token_bytes,
            tiers,
        )
        for at, tiers in enumerate(tiers_of_blocks)
    ]


def carry_out(world: World, blocks: Sequence[MissingBlock], sources: Sources) -> float:
    """Seconds until all blocks are there, each from its source."""
    arrivals = _arrivals(world, blocks, sources)
    waiting = list(_segments(blocks, sources, arrivals))
    now = 0.0
    while waiting:
        now = max(now, waiting[0][1])
        now += world.step_s(_next_step(waiting, now, world.step_tokens))
    return max([now, *arrivals])


def _next_step(waiting: list[tuple[Span, float]], now: float, budget: int) -> list[Span]:
    """Take what a step can compute now from the front of what is waiting."""
    spans = []
    while waiting and budget and waiting[0][1] <= now:
        segment, ready_s = waiting.pop(0)
        stop = min(segment.stop, segment.start + budget)
        spans.append(Span(segment.start, stop))
        budget -= stop - segment.start
        if stop < segment.stop:
            waiting.insert(0, (Span(stop, segment.stop), ready_s))
    return spans


def _arrivals(world: World, blocks: Sequence[MissingBlock], sources: Sources) -> list[float]:
    """When each block has come from its tier, 0 for those that are computed."""
    tier_to_bytes: dict[str, int] = dict.fromkeys(world.loads, 0)
    arrivals = []
    for block, source in zip(blocks, sources, strict=True):
        if source is None:
            arrivals.append(0.0)
            continue
        tier_to_bytes[source] += block.num_bytes
        arrivals.append(world.loads[source].seconds(tier_to_bytes[source]))
    return arrivals


def _segments(
    blocks: Sequence[MissingBlock], sources: Sources, arrivals: Sequence[float]
) -> Iterator[tuple[Span, float]]:
    """Runs to compute, each with the time at which all before it is there."""
    waiting: Span | None = None
    ready_s = started_s = 0.0
    for block, source, arrival_s in zip(blocks, sources, arrivals, strict=True):
        if source is None:
            if waiting is not None and waiting.stop == block.span.start:
                waiting = Span(waiting.start, block.span.stop)
                continue
            if waiting is not None:
                yield waiting, started_s
            waiting, started_s = block.span, ready_s
        else:
            ready_s = max(ready_s, arrival_s)
            if waiting is not None:
                yield waiting, started_s
                waiting = None
    if waiting is not None:
        yield waiting, started_s


def best_of_all(world: World, blocks: Sequence[MissingBlock]) -> float:
    """The least seconds of every assignment of sources; for a few blocks."""
    choices = [(None, *(name for name in block.tiers if name in world.loads)) for block in blocks]
    return min(carry_out(world, blocks, sources) for sources in product(*choices))


def best_of_family(world: World, blocks: Sequence[MissingBlock]) -> float:
    """The least seconds of all plans that load from some tiers before a middle and from some behind it."""
    names = sorted({name for block in blocks for name in block.tiers})
    sets = [
        tuple(name for name, is_in in zip(names, bits, strict=True) if is_in)
        for bits in product((False, True), repeat=len(names))
    ]
    best = float("inf")
    for before, behind in product(sets, sets):
        first = [_fastest(world, block, before) for block in blocks]
        second = [_fastest(world, block, behind) for block in blocks]
        for middle in range(len(blocks) + 1):
            sources = (*first[:middle], *second[middle:])
            best = min(best, carry_out(world, blocks, sources))
    return best


def _fastest(world: World, block: MissingBlock, among: Sequence[str]) -> str | None:
    usable = [name for name in block.tiers if name in among]
    return min(usable, key=lambda name: world.loads[name].seconds(block.num_bytes), default=None)


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a planner knows of a world."""

    compute: ComputeCost
    loads: Mapping[str, TierLoad]


def learn(
    world: World,
    chooser: Random,
    *,
    num_samples: int,
    most_tokens: int,
    token_bytes: int,
    noise: Noise,
) -> Learnt:
    """Fit costs to noisy measurements of a world, from a start that knows nothing of it."""
    compute = ComputeFit(ComputeCost(fixed_s=0.01, linear_s=1e-4, quadratic_s=1e-9))
    fits = {name: LoadFit(LoadCost(latency_s=0.001, bytes_per_s=1e9)) for name in world.loads}
    for _ in range(num_samples):
        num_tokens = min(int(2 ** chooser.uniform(0, 12)), world.step_tokens, most_tokens)
        start = chooser.randrange(most_tokens - num_tokens + 1)
        span = Span(start, start + num_tokens)
        compute.observe([span], noise.of(world.step_s([span]), chooser))
        for name, fit in fits.items():
            cost = world.loads[name].cost
            num_bytes = token_bytes * int(2 ** chooser.uniform(5, 12))
            queued = token_bytes * chooser.choice([0, 0, 32, 256])
            seconds = noise.of(cost.seconds(num_bytes, queued), chooser)
            fit.observe(num_bytes, seconds, queued)
    loads = {
        name: TierLoad(fits[name].cost, load.queued_bytes) for name, load in world.loads.items()
    }
    return Learnt(compute.cost, loads)
