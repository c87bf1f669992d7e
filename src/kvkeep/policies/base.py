"""The contract of an eviction policy: which block goes first.

A policy holds the *evictable* items of one place: those kept only in the hope of reuse. Items that
somebody is using are not in it. On the device an item is a BlockId, below it a BlockKey.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

__all__ = ["EvictionPolicy", "Item"]

Item = TypeVar("Item", bound=Hashable)


class EvictionPolicy(ABC, Generic[Item]):
    """Orders evictable items; owns both the structure and the decision."""

    @abstractmethod
    def insert(self, items: Sequence[Item]) -> None:
        """Make items evictable, as the most recently used.

        `items` lie in chain order, root first. Within one call the leaf goes before its parents,
        because a block whose parent is gone can be reused only after its parent is recomputed.
        The caller guarantees that none is in the policy.
        """

    @abstractmethod
    def remove(self, items: Sequence[Item]) -> None:
        """Take items out because they are used again; the policy may remember that they were.

        The caller guarantees that all are in the policy.
        """

    @abstractmethod
    def forget(self, items: Sequence[Item]) -> None:
        """Take items out, where present, because their content is gone; nothing is remembered."""

    @abstractmethod
    def evict(self, num_items: int) -> list[Item] | None:
        """Take the `num_items` least valuable items out and return them, first to go first.

        Returns None and changes nothing when there are fewer.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of evictable items."""

    @abstractmethod
    def __contains__(self, item: object) -> bool:
        """Whether `item` is evictable."""
