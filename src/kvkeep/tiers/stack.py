"""Tiers in order, nearest first: where a block is, where it is written on which occasion, what falls down.

A block may lie in several tiers: a lower copy is what survives. Nothing here touches the device.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol, runtime_checkable

import numpy as np

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Occasion, Presence, PutOutcome, RankOf, Spill, Tier

__all__ = ["Floor", "Landed", "Parts", "Sighting", "SpillingTier", "TierStack"]

# Makes the parts of an object anew for every tier that it is written to.
Parts = Callable[[], Iterable[memoryview]]
# What is called with an object that has fallen, the labels that it had, and what became of it in each tier.
Landed = Callable[[StoredKey, bytes, Mapping[int, PutOutcome]], None]


@runtime_checkable
class SpillingTier(Protocol):
    """A tier that shows what it evicts, before its place is reused."""

    on_evict: Spill | None


@dataclass(frozen=True, slots=True)
class Floor:
    """A tier of a stack, and the occasions on which blocks are written to it."""

    tier: Tier
    write_on: frozenset[Occasion]


@dataclass(frozen=True, slots=True)
class Sighting:
    """The nearest tier, by number, that has a block, or is about to."""

    at: int
    presence: Presence


class TierStack:
    """Floors by number, 0 the nearest to the device.

    What a tier evicts falls, with its labels, to the next one that takes it: at once, or as `defer` sees to
    it, which queues a job and says whether it could; `num_dropped` is how often it could not. `on_landed`
    hears of it, on the thread that wrote it: what came between its fall and its end it has to know.
    """

    def __init__(self, floors: Sequence[Floor]) -> None:
        self.floors = tuple(floors)
        # Nearest first; those that answer `find` from memory, and those that are asked over some wire.
        self.tiers = tuple(floor.tier for floor in self.floors)
        self.local = tuple(at for at, tier in enumerate(self.tiers) if tier.capabilities.is_local)
        self.distant = tuple(
            at for at, tier in enumerate(self.tiers) if not tier.capabilities.is_local
        )
        self.defer: Callable[[Callable[[], None]], bool] | None = None
        self.on_landed: Landed | None = None
        self.num_dropped = 0
        self._lock = Lock()
        self._spilling: dict[StoredKey, _Spilling] = {}
        for at, floor in enumerate(self.floors):
            if isinstance(floor.tier, SpillingTier):
                floor.tier.on_evict = self._spill_from(at)

    def find(
        self, keys: Sequence[StoredKey], among: Sequence[int] | None = None
    ) -> dict[StoredKey, Sighting]:
        """Where the keys are, each in the nearest tier of `among` (all of them); changes nothing.

        A tier that has it complete comes before a nearer one that is still writing it.
        """
        found: dict[StoredKey, Sighting] = {}
        missing = list(keys)
        for at in range(len(self.floors)) if among is None else among:
            if not missing:
                break
            presences = self.floors[at].tier.find(missing)
            for key, presence in zip(missing, presences, strict=True):
                if presence is Presence.PRESENT or (
                    presence is Presence.IN_FLIGHT and key not in found
                ):
                    found[key] = Sighting(at, presence)
            missing = [
                key
                for key, presence in zip(missing, presences, strict=True)
                if presence is not Presence.PRESENT
            ]
        return found

    def wants(self, key: StoredKey, occasion: Occasion, among: Sequence[int] | None = None) -> bool:
        """Whether `put` would write to some tier of `among` (all of them), asked in memory only."""
        return any(
            occasion in self.floors[at].write_on
            and not (at in self.local and self.tiers[at].find((key,))[0] is not Presence.ABSENT)
            for at in (range(len(self.floors)) if among is None else among)
        )

    def put(
        self,
        key: StoredKey,
        parts: Parts,
        num_bytes: int,
        occasion: Occasion,
        *,
        labels: bytes = b"",
    ) -> dict[int, PutOutcome]:
        """Write an object to every tier that takes it on this occasion; what became of it in each.

        What is evicted goes one floor down only: to the nearest tier that takes it, unless one has it. Where
        it is PRESENT, its labels stay as they are.
        """
        if occasion is Occasion.EVICTED:
            return self._put_below(0, key, parts, num_bytes, labels)
        return {
            at: floor.tier.put(key, parts(), num_bytes, labels)
            for at, floor in enumerate(self.floors)
            if occasion in floor.write_on
        }

    def rank_by(self, rank_of: RankOf) -> None:
        """Let every tier evict objects of a lower rank first."""
        for tier in self.tiers:
            tier.rank_by(rank_of)

    def delete(self, keys: Sequence[StoredKey]) -> dict[int, int]:
        """Forget objects everywhere, also those that are falling; how many there were in each tier."""
        with self._lock:
            for key in keys if self._spilling else ():
                if key in self._spilling:
                    self._spilling[key].is_cancelled = True
        return {at: floor.tier.delete(keys) for at, floor in enumerate(self.floors)}

    @property
    def num_spilling(self) -> int:
        """Objects that are falling."""
        return len(self._spilling)

    def cancel_spills(self) -> None:
        """What is falling is not to land."""
        with self._lock:
            for spilling in self._spilling.values():
                spilling.is_cancelled = True

    def touch(self, keys: Sequence[StoredKey]) -> None:
        """Count a use, elsewhere, of what local tiers have; keys lie in chain order."""
        for at in self.local:
            self.floors[at].tier.touch(keys)

    def close(self) -> None:
        """Close all tiers, the nearest first."""
        for tier in self.tiers:
            tier.close()

    def _put_below(
        self, first: int, key: StoredKey, parts: Parts, num_bytes: int, labels: bytes
    ) -> dict[int, PutOutcome]:
        below = range(first, len(self.floors))
        if any(
            self.tiers[at].find((key,))[0] is Presence.PRESENT for at in below if at in self.local
        ):
            return {}
        outcomes: dict[int, PutOutcome] = {}
        for at in below:
            floor = self.floors[at]
            if Occasion.EVICTED in floor.write_on:
                outcomes[at] = floor.tier.put(key, parts(), num_bytes, labels)
                if outcomes[at] in (PutOutcome.STORED, PutOutcome.PRESENT):
                    break
        return outcomes

    def _spill_from(self, at: int) -> Spill:
        def spill(key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
            num_bytes = sum(part.nbytes for part in parts)
            if self.defer is None:
                self._fall(at + 1, key, parts, num_bytes, labels)
                return
            # The place above is reused at once: what waits must have bytes of its own.
            taken = [np.frombuffer(part, np.uint8).copy().data for part in parts]
            spilling = _Spilling()
            with self._lock:
                self._spilling[key] = spilling
            if not self.defer(partial(self._land, at + 1, key, taken, labels, spilling)):
                self._end_spill(key, spilling)
                self.num_dropped += 1

        return spill

    def _land(
        self,
        first: int,
        key: StoredKey,
        parts: Sequence[memoryview],
        labels: bytes,
        spilling: "_Spilling",
    ) -> None:
        """Write what fell, unless it has been deleted meanwhile."""
        if not spilling.is_cancelled:
            self._fall(first, key, parts, sum(part.nbytes for part in parts), labels)
        self._end_spill(key, spilling)
        if spilling.is_cancelled:
            for floor in self.floors[first:]:
                floor.tier.delete([key])

    def _fall(
        self, first: int, key: StoredKey, parts: Sequence[memoryview], num_bytes: int, labels: bytes
    ) -> None:
        outcomes = self._put_below(first, key, lambda: parts, num_bytes, labels)
        if outcomes and self.on_landed is not None:
            self.on_landed(key, labels, outcomes)

    def _end_spill(self, key: StoredKey, spilling: "_Spilling") -> None:
        with self._lock:
            if self._spilling.get(key) is spilling:
                del self._spilling[key]


@dataclass(slots=True)
class _Spilling:
    """An object on its way down from a tier that had no room for it any more."""

    is_cancelled: bool = False
