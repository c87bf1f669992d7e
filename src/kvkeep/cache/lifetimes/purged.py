"""What purges mean of blocks that come from tiers later."""

from collections import deque
from dataclasses import replace

from kvkeep.cache.lifetimes.labels import Labels
from kvkeep.cache.lifetimes.selector import Query
from kvkeep.spec import BlockKey

__all__ = ["Purged"]

# Purges that are over and against which is still checked what a tier has failed to delete.
_MOST_OVER = 64


class Purged:
    """Purges that go on in tiers, and the last ones that are over."""

    def __init__(self) -> None:
        self._going_on: list[Query] = []
        self._over: deque[Query] = deque(maxlen=_MOST_OVER)

    def begin(self, query: Query, now_s: float) -> Query:
        """From now on blocks are checked that were created before; returns what `end` wants."""
        before = now_s if query.created_before is None else query.created_before
        bounded = replace(query, created_before=before)
        self._going_on.append(bounded)
        return bounded

    def end(self, bounded: Query) -> None:
        """All of it is gone from tiers, but for what a tier has failed to delete."""
        self._going_on.remove(bounded)
        self._over.append(bounded)

    def is_under_way(self, key: BlockKey, labels: Labels) -> bool:
        """Whether a purge that goes on means a block: it looks for that itself, and counts it."""
        return any(one.means(key, labels) for one in self._going_on)

    def means(self, key: BlockKey, labels: Labels) -> bool:
        """Whether a block that is not known here was purged."""
        return any(one.means(key, labels) for one in (*self._going_on, *self._over))
