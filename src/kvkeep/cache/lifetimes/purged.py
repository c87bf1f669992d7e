"""What purges mean of blocks that come from tiers later."""

from collections import deque
from dataclasses import replace
from itertools import count
from typing import NewType

from kvkeep.cache.lifetimes.labels import Labels
from kvkeep.cache.lifetimes.selector import Query
from kvkeep.spec import BlockKey

__all__ = ["PurgeNumber", "Purged"]

# Purges that are over and against which is still checked what a tier has failed to delete.
_MOST_OVER = 64

PurgeNumber = NewType("PurgeNumber", int)


class Purged:
    """Purges that go on in tiers, and the last ones that are over."""

    def __init__(self) -> None:
        self._numbers = count()
        self._going_on: dict[PurgeNumber, Query] = {}
        self._over: deque[Query] = deque(maxlen=_MOST_OVER)

    def begin(self, query: Query, now_s: float) -> PurgeNumber:
        """From now on blocks are checked that were created before."""
        before = now_s if query.created_before is None else query.created_before
        bounded = replace(query, created_before=before)
        if bounded.versions:
            for number, one in self._going_on.items():
                self._going_on[number] = one.renewed(bounded)
            self._over = deque((one.renewed(bounded) for one in self._over), _MOST_OVER)
        number = PurgeNumber(next(self._numbers))
        self._going_on[number] = bounded
        return number

    def end(self, number: PurgeNumber) -> None:
        """All of it is gone from tiers, but for what a tier has failed to delete."""
        self._over.append(self._going_on.pop(number))

    def is_under_way(self, key: BlockKey, labels: Labels) -> bool:
        """Whether a purge that goes on means a block: it looks for that itself, and counts it."""
        return any(one.means(key, labels) for one in self._going_on.values())

    def means(self, key: BlockKey, labels: Labels) -> bool:
        """Whether a block that is not known here was purged."""
        return self.is_under_way(key, labels) or any(one.means(key, labels) for one in self._over)
