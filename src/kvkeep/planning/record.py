"""How well the planner predicts: its decisions, and what they turned out to take."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvkeep.planning.split_plan import SplitKind, SplitPlan

__all__ = ["PlannerRecord", "PlannerStats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerStats:
    """Decisions since the start.

    `predicted_s` and `actual_s` are sums over the `num_finished` plans whose outcome is known, and
    `mean_error` the mean of |actual - predicted| / actual over them, None before the first.
    """

    num_decisions: Mapping[str, int]
    num_finished: int
    predicted_s: float
    actual_s: float
    mean_error: float | None


class PlannerRecord:
    """Counts plans when they are made, and again when they have been carried out; for one thread."""

    def __init__(self) -> None:
        self._num_decisions: Counter[SplitKind] = Counter()
        self._num_finished = 0
        self._predicted_s = 0.0
        self._actual_s = 0.0
        self._errors = 0.0

    @property
    def stats(self) -> PlannerStats:
        """All counters as of now."""
        return PlannerStats(
            num_decisions={str(kind): self._num_decisions[kind] for kind in SplitKind},
            num_finished=self._num_finished,
            predicted_s=self._predicted_s,
            actual_s=self._actual_s,
            mean_error=self._errors / self._num_finished if self._num_finished else None,
        )

    def decide(self, plan: SplitPlan) -> None:
        """Enter a plan that will be carried out."""
        self._num_decisions[plan.kind] += 1

    def finish(self, plan: SplitPlan, actual_s: float) -> None:
        """Enter what an undisturbed plan took, from the decision until all blocks were there."""
        if actual_s <= 0:
            return
        self._num_finished += 1
        self._predicted_s += plan.seconds
        self._actual_s += actual_s
        self._errors += abs(actual_s - plan.seconds) / actual_s
