"""Segmented LRU: what was used twice outlives what was used once.

Source: Karedla, Love, Wherry, "Caching strategies to improve disk system performance", Computer
27(3), 1994.
"""

from collections.abc import Sequence

from kvkeep.policies.base import EvictionPolicy, Item
from kvkeep.policies.lru import LRU

__all__ = ["SLRU"]


class SLRU(EvictionPolicy[Item]):
    """New items enter a probation segment; items used again return to a protected one.

    After every insert the protected segment holds at most `protected_share` of the items; its
    oldest fall back to probation, where they are again the most recently used. With a small share it finds
    what an LRU finds and more; a large one holds on to what has had its time (docs/decisions/0013).
    """

    def __init__(self, protected_share: float = 0.2) -> None:
        self._probation: LRU[Item] = LRU()
        self._protected: LRU[Item] = LRU()
        self._reused: set[Item] = set()
        self._protected_share = protected_share

    def insert(self, items: Sequence[Item]) -> None:
        self._probation.insert([item for item in items if item not in self._reused])
        self._protected.insert([item for item in items if item in self._reused])
        excess = len(self._protected) - int(self._protected_share * len(self))
        demoted = self._protected.evict(max(0, excess))
        assert demoted is not None
        self._reused.difference_update(demoted)
        # Leaf first out of the protected segment, so root first again for the contract of insert.
        self._probation.insert(demoted[::-1])

    def remove(self, items: Sequence[Item]) -> None:
        self._reused.update(items)
        self._drop(items)

    def forget(self, items: Sequence[Item]) -> None:
        self._reused.difference_update(items)
        self._drop(items)

    def evict(self, num_items: int) -> list[Item] | None:
        if num_items > len(self):
            return None
        from_probation = self._probation.evict(min(num_items, len(self._probation)))
        assert from_probation is not None
        from_protected = self._protected.evict(num_items - len(from_probation))
        assert from_protected is not None
        self._reused.difference_update(from_protected)
        return from_probation + from_protected

    def _drop(self, items: Sequence[Item]) -> None:
        self._probation.forget(items)
        self._protected.forget(items)

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, item: object) -> bool:
        return item in self._probation or item in self._protected
