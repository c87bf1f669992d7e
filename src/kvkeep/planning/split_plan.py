"""What the choice between loading and computing is made of, and what comes of it: plain values."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvkeep.planning.cost import LoadCost
from kvkeep.planning.coverage import Run
from kvkeep.spec import Span

__all__ = ["MissingBlock", "SplitKind", "SplitPlan", "TierLoad", "join_runs"]


@dataclass(frozen=True, slots=True)
class MissingBlock:
    """Positions that are not on the device; what is stored of them in bytes, and the tiers that have it."""

    span: Span
    num_bytes: int = 0
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TierLoad:
    """What loading from a tier costs, and what is queued there already."""

    cost: LoadCost
    queued_bytes: int = 0

    def seconds(self, num_bytes: int) -> float:
        """Until so many bytes more have come."""
        return self.cost.seconds(num_bytes, self.queued_bytes)


class SplitKind(StrEnum):
    """What a plan does with the blocks that some tier has."""

    LOAD = "load"  # all of them are loaded
    COMPUTE = "compute"  # none is
    SPLIT = "split"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPlan:
    """A source for every missing block: a tier's name, or None to compute it; `runs` are the same joined.

    `seconds` until all is there, of which the model computes for `compute_s`; the last load ends after
    `load_s`. `all_load_s` and `all_compute_s` are what the two simple plans would take. All predicted.
    """

    kind: SplitKind
    sources: tuple[str | None, ...]
    runs: tuple[Run, ...]
    seconds: float
    compute_s: float
    load_s: float
    all_load_s: float
    all_compute_s: float


def join_runs(blocks: Sequence[MissingBlock], sources: Sequence[str | None]) -> tuple[Run, ...]:
    """Blocks that follow one another and have the same source, as one run each."""
    runs: list[Run] = []
    for block, source in zip(blocks, sources, strict=True):
        if runs and runs[-1].source == source and runs[-1].stop == block.span.start:
            runs[-1] = Run(runs[-1].start, block.span.stop, source)
        else:
            runs.append(Run(block.span.start, block.span.stop, source))
    return tuple(runs)
