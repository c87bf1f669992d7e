"""Greedy dual size frequency: what is used rarely, cheap to lose and large goes first.

Source: Cherkasova, "Improving WWW proxies performance with greedy-dual-size-frequency caching policy",
Hewlett-Packard Laboratories, HPL-98-69R1, 1998.
"""

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from kvkeep.policies.base import EvictionPolicy, Item

__all__ = ["GDSF"]

# Entries of the heap beyond twice those that count, before it is built anew.
_STALE_ENTRIES = 64


class GDSF(EvictionPolicy[Item]):
    """The item of the least value goes first, and its value becomes the age of the place.

    The value of an item is `age + uses * cost / size`, with the age at its last use, so that what was used
    often long ago is overtaken by newer items. `cost_of` says what losing an item costs and `size_of` what
    room it takes, in any units, both above zero; without them all items are equal. Items of equal value go
    in the order of their last use.
    """

    def __init__(
        self,
        *,
        cost_of: Callable[[Item], float] | None = None,
        size_of: Callable[[Item], float] | None = None,
    ) -> None:
        self._cost_of = cost_of
        self._size_of = size_of
        self._age = 0.0
        self._num_inserts = 0
        self._item_to_uses: dict[Item, int] = {}
        # The number of the insert that made an item evictable: its entry in the heap is the one with it.
        self._item_to_order: dict[Item, int] = {}
        self._heap: list[tuple[float, int, Item]] = []

    def insert(self, items: Sequence[Item]) -> None:
        for item in reversed(items):
            uses = self._item_to_uses.get(item, 0) + 1
            self._item_to_uses[item] = uses
            self._num_inserts += 1
            self._item_to_order[item] = self._num_inserts
            value = self._age + uses * self._weight(item)
            heappush(self._heap, (value, self._num_inserts, item))
        if len(self._heap) > 2 * len(self._item_to_order) + _STALE_ENTRIES:
            self._drop_stale()

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            del self._item_to_order[item]

    def forget(self, items: Sequence[Item]) -> None:
        for item in items:
            self._item_to_order.pop(item, None)
            self._item_to_uses.pop(item, None)

    def evict(self, num_items: int) -> list[Item] | None:
        if num_items > len(self._item_to_order):
            return None
        evicted: list[Item] = []
        while len(evicted) < num_items:
            value, order, item = heappop(self._heap)
            if self._item_to_order.get(item) == order:
                self._age = value
                del self._item_to_order[item], self._item_to_uses[item]
                evicted.append(item)
        return evicted

    def _weight(self, item: Item) -> float:
        cost = 1.0 if self._cost_of is None else self._cost_of(item)
        size = 1.0 if self._size_of is None else self._size_of(item)
        return cost / size

    def _drop_stale(self) -> None:
        orders = self._item_to_order
        self._heap = [entry for entry in self._heap if orders.get(entry[2]) == entry[1]]
        heapify(self._heap)

    def __len__(self) -> int:
        return len(self._item_to_order)

    def __contains__(self, item: object) -> bool:
        return item in self._item_to_order
