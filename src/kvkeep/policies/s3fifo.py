"""S3-FIFO: a small queue lets pass what is used once, a main queue keeps the rest.

Source: Yang, Zhang, Qiu, Yue, Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvkeep.policies.base import EvictionPolicy, Item

__all__ = ["S3FIFO"]

_MOST_USES = 3


class S3FIFO(EvictionPolicy[Item]):
    """New items enter a small queue; those used again more than once move from its end to the main queue.

    At the end of the main queue an item that was used goes round once more for every use, up to three. The
    small queue gives items up while it has `small_share` of them. Unlike in the paper an item that is used
    goes to the back of its queue: it was not in the policy while somebody held it.

    With `remembers_evicted` an item that went out of the small queue and comes back enters the main queue; as
    many are remembered as there are evictable ones. That needs items that name a content for ever.
    """

    def __init__(self, *, small_share: float = 0.1, remembers_evicted: bool = False) -> None:
        self._small_share = small_share
        self._remembers_evicted = remembers_evicted
        # The first key is the first to go; a plain dict would step over all that went before it.
        self._small: OrderedDict[Item, None] = OrderedDict()
        self._main: OrderedDict[Item, None] = OrderedDict()
        # Of all items in the policy, and of those in use that were in it before.
        self._item_to_uses: dict[Item, int] = {}
        self._of_main: set[Item] = set()
        self._ghosts: OrderedDict[Item, None] = OrderedDict()

    def insert(self, items: Sequence[Item]) -> None:
        for item in reversed(items):
            uses = self._item_to_uses.get(item)
            self._item_to_uses[item] = 0 if uses is None else min(uses + 1, _MOST_USES)
            if item in self._ghosts:
                del self._ghosts[item]
                self._of_main.add(item)
            (self._main if item in self._of_main else self._small)[item] = None

    def remove(self, items: Sequence[Item]) -> None:
        for item in items:
            del (self._main if item in self._of_main else self._small)[item]

    def forget(self, items: Sequence[Item]) -> None:
        for item in items:
            self._small.pop(item, None)
            self._main.pop(item, None)
            self._ghosts.pop(item, None)
            self._item_to_uses.pop(item, None)
            self._of_main.discard(item)

    def evict(self, num_items: int) -> list[Item] | None:
        if num_items > len(self):
            return None
        return [self._evict_one() for _ in range(num_items)]

    def _evict_one(self) -> Item:
        while True:
            if self._small and (
                not self._main or len(self._small) >= self._small_share * len(self)
            ):
                item, _ = self._small.popitem(last=False)
                if self._item_to_uses[item] <= 1:
                    self._remember(item)
                    break
                # Only uses in the main queue count there.
                self._item_to_uses[item] = 0
                self._of_main.add(item)
                self._main[item] = None
            else:
                item, _ = self._main.popitem(last=False)
                if not self._item_to_uses[item]:
                    self._of_main.discard(item)
                    break
                self._item_to_uses[item] -= 1
                self._main[item] = None
        del self._item_to_uses[item]
        return item

    def _remember(self, item: Item) -> None:
        if self._remembers_evicted:
            self._ghosts[item] = None
            while len(self._ghosts) > len(self) + 1:
                self._ghosts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, item: object) -> bool:
        return item in self._small or item in self._main
