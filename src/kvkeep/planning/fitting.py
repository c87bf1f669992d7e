"""Linear costs fitted online: what a machine really takes, though some of its times are nonsense.

Times of one kind of work spread over decades and have a long tail, since machines are interrupted and never
hurried. So errors are relative, large ones count little (Huber, Ann. Math. Statist. 35, 1964, by iterated
weights), coefficients are never negative, and each size of work has a memory of its own: ten thousand short
steps do not make the fit forget what the few long ones took.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LinearFit"]

# Observations of one size of work that are remembered.
_MEMORY = 12
# What an observation weighs, about, divided by what the start does, for what observations leave open.
_START_WEIGHT = 1e-6
# Residuals of more than so many times the usual one count less.
_HUBER = 1.5
_LEAST_SPREAD = 0.02
_ROUNDS = 4
# How far a prediction may be off to be used for weights.
_MOST_OFF = 4.0
_LEAST_S = 1e-12

_Floats = NDArray[np.float64]


class LinearFit:
    """Fits `seconds = coefficients . features`, all of them 0 or more; for one thread.

    `start` is the best guess before anything was seen, and `scales` how large, about, coefficients are.
    """

    def __init__(self, start: Sequence[float], scales: Sequence[float]) -> None:
        assert all(value >= 0 for value in start)
        assert all(value > 0 for value in scales)
        self._scales: _Floats = np.array(scales, dtype=np.float64)
        self._start: _Floats = np.array(start, dtype=np.float64) / self._scales
        self._solution = self._start
        self._size_to_ring: dict[Hashable, _Ring] = {}
        # A row for each remembered observation; 0 seconds where there is none yet.
        self._rows: _Floats = np.zeros((0, len(scales)))
        self._seconds: _Floats = np.zeros(0)
        self._num_observed = 0
        self._is_solved = True

    @property
    def num_observed(self) -> int:
        """Observations so far."""
        return self._num_observed

    @property
    def coefficients(self) -> tuple[float, ...]:
        """One per feature, as of all observations."""
        if not self._is_solved:
            self._solve()
            self._is_solved = True
        return tuple(float(value) for value in self._solution * self._scales)

    def observe(self, features: Sequence[float], seconds: float, size: Hashable) -> None:
        """Learn from one measurement; `size` says with which earlier ones it competes for memory.

        Cheap: what it means is worked out when somebody asks for the coefficients.
        """
        assert seconds > 0
        ring = self._size_to_ring.get(size)
        if ring is None:
            ring = self._size_to_ring[size] = _Ring(len(self._seconds))
            self._rows = np.concatenate([self._rows, np.zeros((_MEMORY, len(self._scales)))])
            self._seconds = np.concatenate([self._seconds, np.zeros(_MEMORY)])
        at = ring.advance()
        self._rows[at] = np.array(features, dtype=np.float64) * self._scales
        self._seconds[at] = seconds
        self._num_observed += 1
        self._is_solved = False

    def _solve(self) -> None:
        is_filled = self._seconds > 0
        rows, seconds = self._rows[is_filled], self._seconds[is_filled]
        for _ in range(_ROUNDS):
            predicted = np.maximum(rows @ self._solution, _LEAST_S)
            residuals = np.abs(np.log(seconds / predicted))
            spread = max(1.5 * float(np.median(residuals)), _LEAST_SPREAD)
            trust = np.minimum(1, _HUBER * spread / np.maximum(residuals, _LEAST_S))
            # Between the relative errors of prediction and observation: too long is as bad as too short.
            near = np.clip(predicted, seconds / _MOST_OFF, seconds * _MOST_OFF)
            weights = trust / (near * seconds)
            normal = (rows * weights[:, None]).T @ rows + _START_WEIGHT * np.eye(rows.shape[1])
            right = rows.T @ (weights * seconds) + _START_WEIGHT * self._start
            self._solution = _least_squares(normal, right)


@dataclass(slots=True)
class _Ring:
    """The rows of one size of work, of which the oldest is used next."""

    first: int
    num_added: int = 0

    def advance(self) -> int:
        """The row for a new observation."""
        self.num_added += 1
        return self.first + (self.num_added - 1) % _MEMORY


def _least_squares(normal: _Floats, right: _Floats) -> _Floats:
    """The x of 0 or more with the least x.normal.x - 2 right.x: exact, by trying which of them are 0."""
    size = len(right)
    best: _Floats = np.zeros(size)
    least = 0.0
    for num_free in range(size, 0, -1):
        for free in combinations(range(size), num_free):
            chosen = list(free)
            candidate = np.zeros(size)
            candidate[chosen] = np.linalg.solve(normal[np.ix_(chosen, chosen)], right[chosen])
            cost = float(candidate @ normal @ candidate - 2 * right @ candidate)
            if (candidate >= 0).all() and cost < least:
                best, least = candidate, cost
        if num_free == size and least < 0:
            break  # nothing is better than what no bound has touched
    return best
