"""Least recently used, leaves before their parents."""

from collections.abc import Sequence
from itertools import islice

from kvkeep.policies.base import EvictionPolicy, Item

__all__ = ["LRU"]


class LRU(EvictionPolicy[Item]):
    """A dict in order of use: the first key is the first to go."""

    def __init__(self) -> None:
        self._items: dict[Item, None] = {}

    def insert(self, items: Sequence[Item]) -> None:
        self._items.update(dict.fromkeys(reversed(items)))

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            del self._items[item]

    def forget(self, items: Sequence[Item]) -> None:
        for item in items:
            self._items.pop(item, None)

    def evict(self, num_items: int) -> list[Item] | None:
        if num_items > len(self._items):
            return None
        evicted = list(islice(self._items, num_items))
        self.remove(evicted)
        return evicted

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items
