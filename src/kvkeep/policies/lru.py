"""Least recently used, leaves before their parents."""

from collections import OrderedDict
from collections.abc import Sequence

from kvkeep.policies.base import EvictionPolicy, Item

__all__ = ["LRU"]


class LRU(EvictionPolicy[Item]):
    """Items in order of use: the first is the first to go."""

    def __init__(self) -> None:
        # To find its first key a plain dict steps over all that went before it.
        self._items: OrderedDict[Item, None] = OrderedDict()

    def insert(self, items: Sequence[Item]) -> None:
        for item in reversed(items):
            self._items[item] = None

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            del self._items[item]

    def forget(self, items: Sequence[Item]) -> None:
        for item in items:
            self._items.pop(item, None)

    def evict(self, num_items: int) -> list[Item] | None:
        if num_items > len(self._items):
            return None
        take_first = self._items.popitem
        return [take_first(last=False)[0] for _ in range(num_items)]

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items
