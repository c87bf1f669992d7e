"""Ranks above a policy: items of a lower rank go before all of a higher one."""

from collections.abc import Sequence
from heapq import merge

from kvkeep.policies.base import EvictionPolicy, Item
from kvkeep.policies.lru import LRU

__all__ = ["DEFAULT_RANK", "FIRST_RANK", "Ranked"]

DEFAULT_RANK = 50
# Below every priority: what is to go before anything else.
FIRST_RANK = -1


class Ranked(EvictionPolicy[Item]):
    """Items of the usual rank are ordered by `policy`, those of any other rank by their last use."""

    def __init__(self, policy: EvictionPolicy[Item]) -> None:
        self._usual = policy
        self._item_to_rank: dict[Item, int] = {}
        self._ranks: dict[int, LRU[Item]] = {}

    def rank(self, items: Sequence[Item], rank: int) -> None:
        """Give items a rank until their content goes, whether they are evictable now or not."""
        moved = [item for item in items if self._item_to_rank.get(item, DEFAULT_RANK) != rank]
        evictable = [item for item in moved if item in self]
        # Not `remove`: being ranked is no use.
        self._of(evictable, forget=True)
        if rank == DEFAULT_RANK:
            for item in moved:
                self._item_to_rank.pop(item, None)
        else:
            self._item_to_rank.update(dict.fromkeys(moved, rank))
        self.insert(evictable)

    def insert(self, items: Sequence[Item]) -> None:
        if not self._item_to_rank:
            self._usual.insert(items)
            return
        get = self._item_to_rank.get
        for rank in sorted({get(item, DEFAULT_RANK) for item in items}):
            own = [item for item in items if get(item, DEFAULT_RANK) == rank]
            self._policy_of(rank).insert(own)

    def remove(self, items: Sequence[Item]) -> None:
        if self._item_to_rank:
            self._of(items, forget=False)
        else:
            self._usual.remove(items)

    def forget(self, items: Sequence[Item]) -> None:
        self._usual.forget(items)
        if self._item_to_rank:
            self._of(items, forget=True)
            for item in items:
                self._item_to_rank.pop(item, None)

    def evict(self, num_items: int) -> list[Item] | None:
        if not self._ranks:
            return self._usual.evict(num_items)
        if num_items > len(self):
            return None
        evicted: list[Item] = []
        for rank in merge(sorted(self._ranks), [DEFAULT_RANK]):
            policy = self._policy_of(rank)
            taken = policy.evict(min(len(policy), num_items - len(evicted)))
            assert taken is not None
            evicted += taken
            if len(evicted) == num_items:
                break
        for item in evicted:
            self._item_to_rank.pop(item, None)
        self._ranks = {rank: policy for rank, policy in self._ranks.items() if len(policy)}
        return evicted

    def _policy_of(self, rank: int) -> EvictionPolicy[Item]:
        if rank == DEFAULT_RANK:
            return self._usual
        return self._ranks.setdefault(rank, LRU())

    def _of(self, items: Sequence[Item], *, forget: bool) -> None:
        """Take evictable items out of the policies that they are in."""
        for item in items:
            rank = self._item_to_rank.get(item, DEFAULT_RANK)
            policy = self._policy_of(rank)
            if forget:
                policy.forget((item,))
            else:
                policy.remove((item,))
            if rank != DEFAULT_RANK and not len(policy):
                del self._ranks[rank]

    def __len__(self) -> int:
        if not self._ranks:
            return len(self._usual)
        return len(self._usual) + sum(map(len, self._ranks.values()))

    def __contains__(self, item: object) -> bool:
        return item in self._usual or any(item in policy for policy in self._ranks.values())
