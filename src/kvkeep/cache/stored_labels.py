"""Labels in tiers and labels here, kept the same: of what is put, what falls, and what others write."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import Change, Lifetimes
from kvkeep.cache.lifetimes.labels import DEFAULT_PRIORITY, decode_labels
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import PutOutcome

__all__ = ["StoredLabels"]

_MOST_DECODED = 4096


class StoredLabels:
    """Listens to what a Hierarchy does; `apply` does what other labels mean for places."""

    def __init__(
        self, lifetimes: Lifetimes, below: Hierarchy, apply: Callable[[Sequence[Change]], None]
    ) -> None:
        self._lifetimes = lifetimes
        self._below = below
        self._apply = apply
        # Tenants some of whose blocks have come to lie in a tier since it was asked last.
        self.grown: set[BlockKey] = set()
        register, relabels = lifetimes.register, below.relabels
        relabels.labels_of = below.copies.labels_of = register.encoded
        relabels.wall_clock = lifetimes.clock
        relabels.on_seen = self._learn
        relabels.on_deleted = below.copies.unremember
        below.copies.on_copied = self._note_copied
        below.stack.on_landed = self._hand_over_landed
        priority_of = lru_cache(_MOST_DECODED)(_priority_of)
        below.stack.rank_by(lambda _key, labels: priority_of(labels))
        below.holds.share = lifetimes.settings.pin_share

    def _note_copied(
        self, key: BlockKey, outcomes: Mapping[int, PutOutcome], labels: bytes
    ) -> None:
        """A block has been written to tiers: of one that was there already the labels are not known."""
        for at, outcome in outcomes.items():
            if outcome is PutOutcome.STORED:
                self._below.relabels.note(key, labels, at)
            elif outcome is PutOutcome.PRESENT:
                self._below.relabels.note(key, b"", at)
        known = self._lifetimes.register.get(key)
        if known is not None:
            self.grown.add(known.namespace)
            if known.pins:
                self._below.holds.hold((key,))

    def _hand_over_landed(
        self, stored: StoredKey, labels: bytes, outcomes: Mapping[int, PutOutcome]
    ) -> None:
        self._below.hand_over(partial(self._note_landed, stored, labels, outcomes))

    def _note_landed(
        self, stored: StoredKey, labels: bytes, outcomes: Mapping[int, PutOutcome]
    ) -> None:
        """An object has fallen: its life may have ended between the two tiers, where nothing finds it."""
        key = BlockKey(stored[:-1])
        if self._lifetimes.register.get(key) is not None:
            self._note_copied(key, outcomes, labels)
        elif not self._lifetimes.restore(key, labels):
            self._below.begin_delete([stored])

    def _learn(self, key: BlockKey, labels: bytes) -> None:
        """Others use a block as well: their labels join ours."""
        known = self._lifetimes.register.get(key)
        if known is not None:
            self._apply(self._lifetimes.arrive(key, known.namespace, labels).changes)


def _priority_of(labels: bytes) -> int:
    decoded = decode_labels(labels)
    return DEFAULT_PRIORITY if decoded is None else decoded.priority
