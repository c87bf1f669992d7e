"""Which block bears which labels: by key, with a way from tags, sessions, pins and tenants to the blocks.

Blocks of equal labels are kept together, so that a purge looks at a few groups and not at every block, and an
expiry is one entry of a heap for all of them. A purge does not even have to look: from the moment that its
tombstone stands here, what it means has no labels any more, whenever the blocks themselves are taken out.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeVar

from kvkeep.cache.lifetimes.labels import (
    ANY_TAG,
    DEFAULT_PRIORITY,
    Labels,
    PinId,
    SessionId,
    encode_labels,
)
from kvkeep.cache.lifetimes.tombstones import LabelGroup, Tombstone
from kvkeep.cache.lifetimes.versions import versioned_names
from kvkeep.spec import BlockKey

__all__ = ["Change", "Register"]

_NEVER = float("inf")
# Entries of the heap beyond twice those that count, before it is built anew.
_STALE_ENTRIES = 64
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Change:
    """Keys whose labels were `old` (None: they had none) and are `new`."""

    old: Labels | None
    new: Labels
    keys: Sequence[BlockKey]


class Register:
    """Labels of every block that is known, wherever it lies. For one thread."""

    def __init__(self) -> None:
        self._key_to_group: dict[BlockKey, LabelGroup] = {}
        self._labels_to_group: dict[Labels, LabelGroup] = {}
        self._key_to_used: dict[BlockKey, float] = {}
        self._tag_to_groups: dict[str, set[LabelGroup]] = {}
        # By tenant, and the name of which a tag is a version.
        self._versions_to_groups: dict[tuple[BlockKey, str], set[LabelGroup]] = {}
        self._session_to_groups: dict[SessionId, set[LabelGroup]] = {}
        self._pin_to_groups: dict[PinId, set[LabelGroup]] = {}
        self._namespace_to_groups: dict[BlockKey, set[LabelGroup]] = {}
        # Entries of groups that are empty by now are stale.
        self._expiries: list[tuple[float, int, LabelGroup]] = []
        self._num_pushed = 0
        self._num_numbered = 0
        # Of purges that have not taken out all that they mean.
        self._tombstones: list[Tombstone] = []
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
        """The labels of a block, None where it has none, or none any more."""
        group = self._key_to_group.get(key)
        if group is None or self._is_buried(key, group):
            return None
        return group.labels

    def encoded(self, key: BlockKey) -> bytes:
        """The labels as they are stored; b"" where there are none."""
        group = self._key_to_group.get(key)
        if group is None or self._is_buried(key, group):
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
        """Whether anything has expired by now, or is being purged."""
        return bool(self._tombstones) or self.next_expiry <= now_s

    def first_end(self, keys: Iterable[BlockKey]) -> float:
        """When the first of the known blocks among these is served no more; infinite for never."""
        known = (self.get(key) for key in keys)
        return min((labels.ends_at for labels in known if labels is not None), default=_NEVER)

    def dead(self, keys: Iterable[BlockKey], now_s: float) -> frozenset[BlockKey]:
        """Those that have expired by now, or are being purged; at no cost while nothing is."""
        if not self.has_dead(now_s):
            return frozenset()
        get = self._key_to_group.get
        return frozenset(
            key
            for key in keys
            if (group := get(key)) is not None
            and (group.labels.ends_at <= now_s or self._is_buried(key, group))
        )

    def is_buried(self, key: BlockKey) -> bool:
        """Whether a block is being purged, and was not computed anew since."""
        group = self._key_to_group.get(key)
        return group is not None and self._is_buried(key, group)

    def is_under(self, tombstone: Tombstone, key: BlockKey) -> bool:
        """Whether a block is meant by this one."""
        group = self._key_to_group.get(key)
        return group is not None and tombstone.means(key, group)

    def due(self, now_s: float) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that have expired by now, by labels."""
        if self.next_expiry > now_s:
            return iter(())
        return self._of([group for at, _, group in self._expiries if at <= now_s])

    def tagged(self, *tags: str) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that one of these tags means, by labels."""
        groups = (self._tag_to_groups.get(one, set()) for one in (*tags, ANY_TAG))
        return self._of(set().union(*groups))

    def of_session(self, *sessions: SessionId) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that one of these sessions uses, by labels."""
        groups = (self._session_to_groups.get(one, set()) for one in sessions)
        return self._of(set().union(*groups))

    def pinned(self, pin: PinId) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks that a pin means, by labels."""
        return self._of(self._pin_to_groups.get(pin, ()))

    def of_namespace(self, namespace: BlockKey) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks of one tenant, by labels."""
        return self._of(self._namespace_to_groups.get(namespace, ()))

    def of_keys(self, keys: Iterable[BlockKey]) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Those of these blocks that have labels, one by one."""
        tombstones = list(self._tombstones)
        groups = ((key, self._key_to_group.get(key)) for key in keys)
        return (
            (group.labels, (key,))
            for key, group in groups
            if group is not None and not any(one.means(key, group) for one in tombstones)
        )

    def all(self) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """All blocks, by labels."""
        return self._of([one for groups in self._namespace_to_groups.values() for one in groups])

    def of_versions(
        self, namespaces: Iterable[BlockKey] | None, *tags: str
    ) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """Blocks of tenants (all of them) that may have a version of a name of these tags, by labels."""
        names = versioned_names(tags)
        if not names:
            return iter(())
        roots = frozenset(self._namespace_to_groups if namespaces is None else namespaces)
        groups = {
            group
            for group in self._tag_to_groups.get(ANY_TAG, ())
            if group.labels.namespace in roots
        }
        return self._of(
            groups.union(
                *(
                    self._versions_to_groups.get((root, name), ())
                    for root in roots
                    for name in names
                )
            )
        )

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
        get = self._key_to_group.get
        groups = [get(key) for key in keys]
        if self._tombstones:
            # What is being purged has no labels to go on from.
            groups = [
                None if group is not None and self._is_buried(key, group) else group
                for key, group in zip(keys, groups, strict=True)
            ]
        first = groups[0]
        if groups.count(first) == len(groups):
            return self._move(keys, first, change)
        by_group: dict[LabelGroup | None, list[BlockKey]] = {}
        for key, group in zip(keys, groups, strict=True):
            by_group.setdefault(group, []).append(key)
        return [one for group, own in by_group.items() for one in self._move(own, group, change)]

    def forget(self, keys: Collection[BlockKey]) -> None:
        """Take blocks out; those that are not there are no matter."""
        self._take_out(keys)
        for key in keys:
            self._key_to_used.pop(key, None)

    def number(self, tombstone: Tombstone) -> None:
        """Let a tombstone mean what fits it now, and nothing that is labelled later."""
        self._num_numbered += 1
        tombstone.number = self._num_numbered

    def bury(self, tombstone: Tombstone) -> None:
        """From now on what the tombstone means has no labels; the blocks are to be taken out by `forget`."""
        self.number(tombstone)
        self._tombstones.append(tombstone)

    def lift(self, tombstone: Tombstone) -> None:
        """All that the tombstone means has been taken out."""
        self._tombstones.remove(tombstone)

    def _of(self, groups: Iterable[LabelGroup]) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """What groups hold that are there now, without what is being purged now."""
        return _unburied(list(groups), list(self._tombstones))

    def _is_buried(self, key: BlockKey, group: LabelGroup) -> bool:
        return any(one.means(key, group) for one in self._tombstones)

    def _take_out(self, keys: Iterable[BlockKey]) -> None:
        emptied = set()
        for key in keys:
            group = self._key_to_group.pop(key, None)
            if group is not None:
                group.keys.discard(key)
                if not group.keys:
                    emptied.add(group)
        for group in emptied:
            self._remove(group)

    def _move(
        self,
        keys: Sequence[BlockKey],
        group: LabelGroup | None,
        change: Callable[[Labels | None], Labels | None],
    ) -> list[Change]:
        old = None if group is None else group.labels
        new = change(old)
        if new is None or new == old:
            return []
        if group is None and self._tombstones:
            self._take_out(keys)
        target = self._labels_to_group.get(new)
        if target is None or any(one.means_some_of(target) for one in self._tombstones):
            target = self._add(new)
        target.keys.update(keys)
        self._key_to_group.update(dict.fromkeys(keys, target))
        if group is not None:
            group.keys.difference_update(keys)
            if not group.keys:
                self._remove(group)
        return [Change(old, new, keys)]

    def _add(self, labels: Labels) -> LabelGroup:
        self._num_numbered += 1
        group = LabelGroup(labels, self._num_numbered)
        self._labels_to_group[labels] = group
        for tag in labels.tags:
            self._tag_to_groups.setdefault(tag, set()).add(group)
        for name in versioned_names(labels.tags):
            self._versions_to_groups.setdefault((labels.namespace, name), set()).add(group)
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

    def _remove(self, group: LabelGroup) -> None:
        """Take a group without keys out of everything but the heap."""
        labels = group.labels
        if self._labels_to_group.get(labels) is group:
            del self._labels_to_group[labels]
        for tag in labels.tags:
            _discard(self._tag_to_groups, tag, group)
        for name in versioned_names(labels.tags):
            _discard(self._versions_to_groups, (labels.namespace, name), group)
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
        for group in {one for groups in self._namespace_to_groups.values() for one in groups}:
            labels = group.labels
            num_keys += len(group.keys)
            if not group.keys:
                problems.append(f"the group of {labels} is empty")
            if any(self._key_to_group.get(key) is not group for key in group.keys):
                problems.append(f"a key of {labels} is in another group")
            if any(group not in self._tag_to_groups.get(tag, ()) for tag in labels.tags):
                problems.append(f"{labels} is not found by its tags")
        if num_keys != len(self._key_to_group):
            problems.append(f"{len(self._key_to_group)} keys have labels, groups have {num_keys}")
        return problems


def _unburied(
    groups: Sequence[LabelGroup], tombstones: Sequence[Tombstone]
) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
    for group in groups:
        meaning = [one for one in tombstones if one.means_some_of(group)]
        if not meaning:
            yield group.labels, group.keys
        elif all(one.fits_key for one in meaning):
            keys = [key for key in group.keys if not any(one.means(key, group) for one in meaning)]
            yield group.labels, keys


def _is_marked(labels: Labels) -> bool:
    return bool(labels.pins) or labels.priority != DEFAULT_PRIORITY


def _discard(index: dict[_Name, set[LabelGroup]], name: _Name, group: LabelGroup) -> bool:
    """Take a group from an index; whether it was the last of its name."""
    groups = index[name]
    groups.discard(group)
    if not groups:
        del index[name]
    return not groups
