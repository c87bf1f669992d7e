"""What steps cost, learnt from those that were run, and what reuse has saved by that measure."""

from collections.abc import Sequence

from kvkeep.cache import Chooser
from kvkeep.planning import ComputeCost, ComputeFit
from kvkeep.scheduling import Request
from kvkeep.spec import Span

__all__ = ["StepCosts"]

# Replaced by the first steps.
_GUESS = ComputeCost(fixed_s=1e-3, linear_s=1e-3, quadratic_s=1e-8)
# With fewer nothing is said: they may all have been of one size.
_FEWEST_STEPS = 8
# The fit is solved anew after so many steps: that takes a millisecond, and costs change slowly.
_STEPS_OF_ONE_FIT = 64


class StepCosts:
    """For the thread that owns the engine. With a `chooser`, which has been calibrated, its fit is used."""

    def __init__(self, chooser: Chooser | None, *, step_tokens: int) -> None:
        self._fit = ComputeFit(_GUESS) if chooser is None else chooser.compute
        self._is_known = chooser is not None
        self._step_tokens = step_tokens
        self._cost = self._fit.cost
        self._solved_at = 0

    def observe(self, spans: Sequence[Span], seconds: float) -> None:
        """A step has computed these spans, of one request or of many."""
        self._fit.observe(spans, seconds)

    def saved_s(self, request: Request) -> float | None:
        """What computing the reused tokens of a prompt would have taken alone; None if that is not known."""
        if not self._is_known and self._fit.num_observed < _FEWEST_STEPS:
            return None
        spans = request.reused_spans if request.reused_tokens else []
        if not spans:
            return 0.0
        cost, num_reused = self._latest(), sum(map(len, spans))
        num_steps = self._num_steps(request.num_prompt)
        num_steps -= self._num_steps(request.num_prompt - num_reused)
        return cost.marginal_s(spans) + cost.fixed_s * num_steps

    def _num_steps(self, num_tokens: int) -> int:
        return -(-num_tokens // self._step_tokens)

    def _latest(self) -> ComputeCost:
        if self._fit.num_observed >= self._solved_at + _STEPS_OF_ONE_FIT or not self._solved_at:
            self._cost, self._solved_at = self._fit.cost, self._fit.num_observed
        return self._cost
