"""What was decided of a request's stored blocks."""

from dataclasses import dataclass

from kvkeep.planning import SplitPlan

__all__ = ["Decision"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, when it was made, and the numbers of stored blocks that are computed all the same."""

    split: SplitPlan
    began_s: float
    computed: frozenset[int]
