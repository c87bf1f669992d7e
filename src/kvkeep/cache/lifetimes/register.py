"""Which block bears which labels: by key, with a way from tags, sessions, pins and tenants to the blocks.

Blocks of equal labels are kept together, so that a purge looks at a few groups and not at every block, and an
expiry is one entry of a heap for all of them.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

from kvkeep.cache.lifetimes.labels import (
    DEFAULT_PRIORITY,
    Labels,
    PinId,
    SessionId,
    encode_labels,
)
from kvkeep.cache.lifetimes.versions import versioned_name
from kvkeep.spec import BlockKey

__all__ = ["Change", "Register"]

_NEVER = float("inf")
# Entries of the heap beyond twice those that count, before it is built anew.
_STALE_ENTRIES = 64
_Name = TypeVar("_Name", bound=Hashable)


class _Group:
    """All keys of equal labels. Compared by identity, which is what makes the common case quick."""

    __slots__ = ("encoded", "keys", "labels")

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.keys: set[BlockKey] = set()
        self.encoded: bytes | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """Keys whose labels were `old` (None: they had none) and are `new`."""

    old: Labels | None
    new: Labels
    keys: Sequence[BlockKey]


class Register:
    """Labels of every block that is known, wherever it lies. For one thread."""

    def __init__(self) -> None:
        self._key_to_group: dict[BlockKey, _Group] = {}
        self._labels_to_group: dict[Labels, _Group] = {}
        self._key_to_used: dict[BlockKey, float] = {}
        self._tag_to_groups: dict[str, set[_Group]] = {}
        # Tags with a version, by the name that they are a version of.
        self._name_to_tags: dict[str, set[str]] = {}
        self._session_to_groups: dict[SessionId, set[_Group]] = {}
        self._pin_to_groups: dict[PinId, set[_Group]] = {}
        self._namespace_to_groups: dict[BlockKey, set[_Group]] = {}
        # Entries of groups that are empty by now are stale.
        self._expiries: list[tuple[float, int, _Group]] = []
        self._num_pushed = 0
        # Without labels, but not yet forgotten everywhere: dead until somebody computes them anew.
        self._doomed: set[BlockKey] = set()
        # Groups of blocks that are pinned or have a priority of their own.
        self.num_marked = 0

    def __len__(self) -> int:
        return len(self._key_to_group)

    def __contains__(self, key: object) -> bool:
        return key in self._key_to_group

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._key_to_group)

    # --- questions -------------------------------------------------------------------------------

    def get(self, key: BlockKey) -> Labels | None:
        """The labels of a block, None where it has none."""
        group = self._key_to_group.get(key)
        return None if group is None else group.labels

    def encoded(self, key: BlockKey) -> bytes:
        """The labels as they are stored; b"" where there are none."""
        group = self._key_to_group.get(key)
        if group is None:
            return b""
        if group.encoded is None:
            group.encoded = encode_labels(group.labels)
        return group.encoded

    def used_at(self, key: BlockKey) -> float | None:
        """When the block was used last, as far as is known; it was created then at the latest."""
        return self._key_to_used.get(key)

    @property
    def next_expiry(self) -> float:
        """No block expires before this time; infinite where none ever does."""
        return self._expiries[0][0] if self._expiries else _NEVER

    def has_dead(self, now_s: float) -> bool:
        """Whether anything has expired by now, or is doomed."""
        return bool(self._doomed) or self.next_expiry <= now_s

    def dead(self, keys: Iterable[BlockKey], now_s: float) -> frozenset[BlockKey]:
        """Those that have expired by now, or are doomed; at no cost while nothing is."""
        if not self.has_dead(now_s):
            return frozenset()
        get, doomed = self._key_to_group.get, self._doomed
        return frozenset(
            key
            for key in keys
            if key in doomed or ((group := get(key)) is not None and group.labels.ends_at <= now_s)
        )

    def is_doomed(self, key: BlockKey) -> bool:
        """Whether a block is to be forgotten, and was not computed anew since."""
        return key in self._doomed

    def due(self, now_s: float) -> list[BlockKey]:
        """All keys that have expired by now."""
        if self.next_expiry > now_s:
            return []
        return [key for at, _, group in self._expiries if at <= now_s for key in group.keys]

    def tagged(self, tag: str) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks with a tag, by labels."""
        return self._of(self._tag_to_groups.get(tag, ()))

    def of_session(self, session: SessionId) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that a session uses, by labels."""
        return self._of(self._session_to_groups.get(session, ()))

    def pinned(self, pin: PinId) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that a pin means, by labels."""
        return self._of(self._pin_to_groups.get(pin, ()))

    def of_namespace(self, namespace: BlockKey) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks of one tenant, by labels."""
        return self._of(self._namespace_to_groups.get(namespace, ()))

    def all(self) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """All blocks, by labels."""
        return self._of(self._labels_to_group.values())

    def versions(self, tag: str) -> Collection[str]:
        """All tags on blocks that are a version of the same name; none for a tag without version."""
        name = versioned_name(tag)
        return () if name is None else self._name_to_tags.get(name, ())

    @property
    def sessions(self) -> Collection[SessionId]:
        """All sessions that use a block."""
        return self._session_to_groups.keys()

    @property
    def pins(self) -> Collection[PinId]:
        """All pins that mean a block."""
        return self._pin_to_groups.keys()

    # --- changes ---------------------------------------------------------------------------------

    def touch(self, keys: Iterable[BlockKey], now_s: float) -> None:
        """Say that blocks are used now."""
        self._key_to_used.update(dict.fromkeys(keys, now_s))

    def update(
        self, keys: Sequence[BlockKey], change: Callable[[Labels | None], Labels | None]
    ) -> list[Change]:
        """Give every key the labels that `change` makes of those that it has; returns what is different.

        `change` is called once for all keys of equal labels; None leaves them as they are.
        """
        if not keys:
            return []
        if self._doomed:
            self._doomed.difference_update(keys)
        get = self._key_to_group.get
        groups = [get(key) for key in keys]
        first = groups[0]
        if groups.count(first) == len(groups):
            return self._move(keys, first, change)
        by_group: dict[_Group | None, list[BlockKey]] = {}
        for key, group in zip(keys, groups, strict=True):
            by_group.setdefault(group, []).append(key)
        return [one for group, own in by_group.items() for one in self._move(own, group, change)]

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Take blocks out; those that are not there are no matter."""
        emptied = set()
        for key in keys:
            group = self._key_to_group.pop(key, None)
            self._key_to_used.pop(key, None)
            if group is not None:
                group.keys.discard(key)
                if not group.keys:
                    emptied.add(group)
        for group in emptied:
            self._remove(group)

    def doom(self, keys: Collection[BlockKey]) -> None:
        """Take blocks out that are still to be forgotten where they lie: `spare` them then."""
        self.forget(keys)
        self._doomed.update(keys)

    def spare(self, keys: Iterable[BlockKey]) -> None:
        """These are forgotten everywhere."""
        self._doomed.difference_update(keys)

    def _of(self, groups: Iterable[_Group]) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        for group in list(groups):
            yield group.labels, group.keys

    def _move(
        self,
        keys: Sequence[BlockKey],
        group: _Group | None,
        change: Callable[[Labels | None], Labels | None],
    ) -> list[Change]:
        old = None if group is None else group.labels
        new = change(old)
        if new is None or new == old:
            return []
        target = self._labels_to_group.get(new) or self._add(new)
        target.keys.update(keys)
        self._key_to_group.update(dict.fromkeys(keys, target))
        if group is not None:
            group.keys.difference_update(keys)
            if not group.keys:
                self._remove(group)
        return [Change(old, new, keys)]

    def _add(self, labels: Labels) -> _Group:
        group = _Group(labels)
        self._labels_to_group[labels] = group
        for tag in labels.tags:
            self._tag_to_groups.setdefault(tag, set()).add(group)
            name = versioned_name(tag)
            if name is not None:
                self._name_to_tags.setdefault(name, set()).add(tag)
        for session in labels.sessions:
            name_of = SessionId(labels.namespace, session)
            self._session_to_groups.setdefault(name_of, set()).add(group)
        for pin in labels.pins:
            self._pin_to_groups.setdefault(pin, set()).add(group)
        self._namespace_to_groups.setdefault(labels.namespace, set()).add(group)
        self.num_marked += _is_marked(labels)
        if labels.ends_at < _NEVER:
            self._num_pushed += 1
            heappush(self._expiries, (labels.ends_at, self._num_pushed, group))
            if len(self._expiries) > 2 * len(self._labels_to_group) + _STALE_ENTRIES:
                self._drop_stale()
        return group

    def _remove(self, group: _Group) -> None:
        """Take a group without keys out of everything but the heap."""
        labels = group.labels
        del self._labels_to_group[labels]
        for tag in labels.tags:
            if _discard(self._tag_to_groups, tag, group):
                name = versioned_name(tag)
                if name is not None:
                    tags = self._name_to_tags[name]
                    tags.discard(tag)
                    if not tags:
                        del self._name_to_tags[name]
        for session in labels.sessions:
            _discard(self._session_to_groups, SessionId(labels.namespace, session), group)
        for pin in labels.pins:
            _discard(self._pin_to_groups, pin, group)
        _discard(self._namespace_to_groups, labels.namespace, group)
        self.num_marked -= _is_marked(labels)
        self._drop_first_stale()

    def _drop_first_stale(self) -> None:
        while self._expiries and not self._expiries[0][2].keys:
            heappop(self._expiries)

    def _drop_stale(self) -> None:
        # The newest group has no keys yet.
        newest = self._num_pushed
        self._expiries = [one for one in self._expiries if one[2].keys or one[1] == newest]
        heapify(self._expiries)

    def check(self) -> list[str]:
        """What is wrong, in words; empty when all is well."""
        problems = []
        num_keys = 0
        for labels, group in self._labels_to_group.items():
            num_keys += len(group.keys)
            if group.labels != labels or not group.keys:
                problems.append(f"the group of {labels} is empty or has other labels")
            if any(self._key_to_group.get(key) is not group for key in group.keys):
                problems.append(f"a key of {labels} is in another group")
            if any(group not in self._tag_to_groups.get(tag, ()) for tag in labels.tags):
                problems.append(f"{labels} is not found by its tags")
        if num_keys != len(self._key_to_group):
            problems.append(f"{len(self._key_to_group)} keys have labels, groups have {num_keys}")
        return problems


def _is_marked(labels: Labels) -> bool:
    return bool(labels.pins) or labels.priority != DEFAULT_PRIORITY


def _discard(index: dict[_Name, set[_Group]], name: _Name, group: _Group) -> bool:
    """Take a group from an index; whether it was the last of its name."""
    groups = index[name]
    groups.discard(group)
    if not groups:
        del index[name]
    return not groups
