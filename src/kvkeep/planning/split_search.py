"""Every way to split a request's missing blocks, each with the time that it would take.

A way has a middle. Before it, what the `near` tiers have is loaded and the rest computed; behind it, what the
`usable` tiers have is loaded, and the rest computed when all loads have come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from kvkeep.planning.cost import ComputeCost
from kvkeep.planning.split_plan import MissingBlock, TierLoad

__all__ = ["Candidate", "SplitSearch", "TierSet"]

_NOBODY = -1
_MARGIN = 0.1
# Of so many tiers all choices are tried; of more, the fastest one, two, three and so on.
_MOST_FREELY_CHOSEN = 2
# Numbers of tiers, the fastest first.
TierSet = tuple[int, ...]
_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way, and its predicted times; `objective` also counts what computing costs others."""

    near: TierSet
    usable: TierSet
    middle: int
    seconds: float
    objective: float
    compute_s: float
    load_s: float


class SplitSearch:
    """Sums over the missing blocks of one request, from which the times of all middles follow at once.

    Arrays are over the blocks, or over the middles: one more than there are blocks.
    """

    def __init__(
        self,
        blocks: Sequence[MissingBlock],
        compute: ComputeCost,
        loads: Mapping[str, TierLoad],
        *,
        step_tokens: int,
        others_weight: float,
    ) -> None:
        self._fixed_s = compute.fixed_s
        self._step_tokens = step_tokens
        self._others_weight = others_weight
        total_bytes = sum(block.num_bytes for block in blocks)
        held = {name for block in blocks for name in block.tiers if name in loads}
        # Names make the order of equally fast tiers one that can be repeated.
        self.tiers = sorted(held, key=lambda name: (loads[name].seconds(total_bytes), name))
        costs = [loads[name].cost for name in self.tiers]
        # Columns, a row for each tier: seconds before the first byte comes, and for every byte.
        queues_s = [loads[name].queued_bytes / loads[name].cost.bytes_per_s for name in self.tiers]
        self._begin_s = _column([c.latency_s + q for c, q in zip(costs, queues_s, strict=True)])
        self._per_byte_s = _column([1 / cost.bytes_per_s for cost in costs])
        self._has = np.array(
            [[name in block.tiers for block in blocks] for name in self.tiers], dtype=np.bool_
        ).reshape(len(self.tiers), len(blocks))
        starts: _Floats = np.array([block.span.start for block in blocks], dtype=np.float64)
        stops: _Floats = np.array([block.span.stop for block in blocks], dtype=np.float64)
        self._bytes: _Floats = np.array([block.num_bytes for block in blocks], dtype=np.float64)
        self._tokens: _Floats = stops - starts
        self._marginal_s: _Floats = (
            compute.linear_s * self._tokens + compute.quadratic_s * (stops**2 - starts**2) / 2
        )
        self._fronts = {tiers: self._front(tiers) for tiers in self.choices}
        self._backs = {tiers: self._back(tiers) for tiers in self.choices}

    @property
    def choices(self) -> list[TierSet]:
        """The sets of tiers from which near and usable ones are taken: the first is none, the last all."""
        every = tuple(range(len(self.tiers)))
        if len(every) > _MOST_FREELY_CHOSEN:
            return [every[:size] for size in range(len(every) + 1)]
        return [chosen for size in range(len(every) + 1) for chosen in combinations(every, size)]

    def best(self, *, near: TierSet, usable: TierSet, limit_s: float = np.inf) -> Candidate | None:
        """The way with the least objective, of those that take no longer than the limit."""
        times = self._times(near, usable)
        objectives = np.where(times.seconds <= limit_s, times.objectives, np.inf)
        middle = int(objectives.argmin())
        return times.at(middle) if np.isfinite(objectives[middle]) else None

    def load_everything(self) -> Candidate:
        """All that tiers have is loaded; the best time for that."""
        every = self.choices[-1]
        loaded = np.flatnonzero(self._sources(every) != _NOBODY)
        first = int(loaded[0]) if len(loaded) else len(self._tokens)
        ways = (self._times((), every).at(first), self.best(near=every, usable=every))
        return min((way for way in ways if way), key=lambda way: way.seconds)

    def compute_everything(self) -> Candidate:
        """Nothing is loaded."""
        return self._times((), ()).at(len(self._tokens))

    def sources(self, way: Candidate) -> tuple[str | None, ...]:
        """The tier of every block, None for those that are computed."""
        before = self._sources(way.near)[: way.middle]
        behind = self._sources(way.usable)[way.middle :]
        numbers = [*before.tolist(), *behind.tolist()]
        return tuple(None if number == _NOBODY else self.tiers[number] for number in numbers)

    @property
    def num_loadable(self) -> int:
        """Blocks that some tier has."""
        return int(self._has.any(axis=0).sum())

    def _sources(self, among: TierSet) -> _Ints:
        """The number of the fastest of these tiers that has each block."""
        if not among:
            return np.full(len(self._tokens), _NOBODY, dtype=np.int64)
        has = self._has[list(among)]
        return np.where(has.any(axis=0), np.array(among)[has.argmax(axis=0)], _NOBODY)

    def _times(self, near: TierSet, usable: TierSet) -> "_Times":
        front, back = self._fronts[near], self._backs[usable]
        load_s = self._loads_s(front.bytes_by_tier + back.bytes_by_tier)
        # Where all loads have come when the last step of the front begins, the rest goes along in it. Who is
        # nearly late for a step may miss it, since no prediction is exact.
        is_in_time = load_s * (1 + _MARGIN) <= front.last_step_s
        room = np.where(is_in_time, front.room, 0.0)
        rest_s = self._steps_s(back.rest_s, np.maximum(back.rest_tokens - room, 0.0))
        compute_s = front.compute_s + rest_s
        total_s = np.maximum(front.end_s, load_s) + rest_s
        return _Times(
            near=near,
            usable=usable,
            seconds=total_s,
            objectives=total_s + self._others_weight * compute_s,
            compute_s=compute_s,
            load_s=load_s,
        )

    def _front(self, near: TierSet) -> "_Front":
        """What happens to the blocks before each middle."""
        before = self._sources(near)
        is_computed = before == _NOBODY
        seconds = _sums_before(np.where(is_computed, self._marginal_s, 0.0))
        tokens = _sums_before(np.where(is_computed, self._tokens, 0.0))
        near_blocks = np.flatnonzero(~is_computed)
        # What is computed in front of the first near load waits for nothing.
        first_near = int(near_blocks[0]) if len(near_blocks) else len(before)
        free = np.minimum(np.arange(len(seconds)), first_near)
        late_tokens = tokens - tokens[free]
        free_s = self._steps_s(seconds[free], tokens[free])
        late_s = self._steps_s(seconds - seconds[free], late_tokens)
        bytes_by_tier = _sums_before(self._bytes_by_tier(before))
        near_s = self._loads_s(bytes_by_tier)
        end_s = np.where(late_tokens > 0, np.maximum(free_s, near_s) + late_s, free_s)
        # Tokens of the last step, and when it begins.
        in_steps = np.where(late_tokens > 0, late_tokens, tokens)
        last = in_steps - self._step_tokens * np.maximum(
            np.ceil(in_steps / self._step_tokens) - 1, 0.0
        )
        last_s = seconds - np.interp(tokens - last, tokens, seconds)
        return _Front(
            end_s=end_s,
            compute_s=free_s + late_s,
            last_step_s=np.where(last > 0, end_s - self._fixed_s - last_s, -1.0),
            room=self._step_tokens - last,
            bytes_by_tier=bytes_by_tier,
        )

    def _back(self, usable: TierSet) -> "_Back":
        """What happens to the blocks behind each middle."""
        behind = self._sources(usable)
        is_rest = behind == _NOBODY
        return _Back(
            rest_s=_sums_behind(np.where(is_rest, self._marginal_s, 0.0)),
            rest_tokens=_sums_behind(np.where(is_rest, self._tokens, 0.0)),
            bytes_by_tier=_sums_behind(self._bytes_by_tier(behind)),
        )

    def _steps_s(self, marginal_s: _Floats, tokens: _Floats) -> _Floats:
        """Seconds of as many steps as so many tokens take."""
        steps: _Floats = marginal_s + self._fixed_s * np.ceil(tokens / self._step_tokens)
        return steps

    def _bytes_by_tier(self, sources: _Ints) -> _Floats:
        """A row for each tier: the bytes of the blocks that come from it, and 0 for the others."""
        numbers = np.arange(len(self.tiers))[:, None]
        return np.where(sources == numbers, self._bytes, 0.0)

    def _loads_s(self, bytes_by_tier: _Floats) -> _Floats:
        """Seconds until the last tier is done; tiers load at the same time."""
        seconds = np.where(bytes_by_tier > 0, self._begin_s + bytes_by_tier * self._per_byte_s, 0.0)
        longest: _Floats = seconds.max(axis=0, initial=0.0)
        return longest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Front:
    """By middle: when the front ends, what it computes, and when its last step begins, with room for more."""

    end_s: _Floats
    compute_s: _Floats
    last_step_s: _Floats
    room: _Floats
    bytes_by_tier: _Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class _Back:
    """By middle: what is computed behind it when all loads have come, and what those load."""

    rest_s: _Floats
    rest_tokens: _Floats
    bytes_by_tier: _Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class _Times:
    """The times of all middles for one choice of near and usable tiers."""

    near: TierSet
    usable: TierSet
    seconds: _Floats
    objectives: _Floats
    compute_s: _Floats
    load_s: _Floats

    def at(self, middle: int) -> Candidate:
        return Candidate(
            near=self.near,
            usable=self.usable,
            middle=middle,
            seconds=float(self.seconds[middle]),
            objective=float(self.objectives[middle]),
            compute_s=float(self.compute_s[middle]),
            load_s=float(self.load_s[middle]),
        )


def _sums_before(values: _Floats) -> _Floats:
    """The sums of all values in front of each middle; blocks are the last axis."""
    sums: _Floats = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def _sums_behind(values: _Floats) -> _Floats:
    return _sums_before(values[..., ::-1])[..., ::-1]


def _column(values: Sequence[float]) -> _Floats:
    return np.array(values, dtype=np.float64)[:, None]
