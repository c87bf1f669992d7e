"""Which keys follow a key: for matches that end inside a block."""

from itertools import islice

from kvkeep.spec import BlockKey

__all__ = ["KeyChildren"]


class KeyChildren:
    """The children of every key, oldest first. Most keys have one, which is kept without a container."""

    def __init__(self) -> None:
        self._parent_to_first: dict[BlockKey, BlockKey] = {}
        self._parent_to_others: dict[BlockKey, dict[BlockKey, None]] = {}

    def __len__(self) -> int:
        return len(self._parent_to_first) + sum(map(len, self._parent_to_others.values()))

    def add(self, parent: BlockKey, key: BlockKey) -> None:
        """Add a child that `parent` does not have."""
        if self._parent_to_first.setdefault(parent, key) is not key:
            self._parent_to_others.setdefault(parent, {})[key] = None

    def remove(self, parent: BlockKey, key: BlockKey) -> None:
        """Take a child out; the caller guarantees that it is there."""
        others = self._parent_to_others.get(parent)
        if self._parent_to_first[parent] != key:
            assert others is not None
            del others[key]
        elif others:
            heir = next(iter(others))
            del others[heir]
            self._parent_to_first[parent] = heir
        else:
            del self._parent_to_first[parent]
        if others is not None and not others:
            del self._parent_to_others[parent]

    def has(self, parent: BlockKey, key: BlockKey) -> bool:
        """Whether `key` is a child of `parent`."""
        return self._parent_to_first.get(parent) == key or key in self._parent_to_others.get(
            parent, ()
        )

    def newest(self, parent: BlockKey, num_keys: int) -> list[BlockKey]:
        """At most `num_keys` children, the newest first."""
        first = self._parent_to_first.get(parent)
        if first is None:
            return []
        newest = list(islice(reversed(self._parent_to_others.get(parent, {})), num_keys))
        return newest if len(newest) == num_keys else [*newest, first]
