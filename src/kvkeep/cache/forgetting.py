"""Blocks on their way out of books and places, in slices between steps.

From the moment that it begins nobody finds what is meant: a tombstone in the register says so. However much
it is, no step waits for more than a slice of it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import thread_time

from kvkeep.blocks import stored_key
from kvkeep.cache.deletions import Deletion
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import (
    Labels,
    Lifetimes,
    PurgeReceipt,
    Query,
    Tombstone,
    match,
)
from kvkeep.cache.pin_holds import PinHolds
from kvkeep.cache.places import Places
from kvkeep.cache.slices import Bits
from kvkeep.planning import DEVICE
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Presence, Tier

__all__ = ["Forgetting", "Forgotten"]

# Blocks that are looked at or given up in one go, and how long such goes are repeated between two steps.
_SLICE = 256
_BUSY_S = 0.004
_IDLE_S = 0.05

# Blocks by labels, as the register gives them.
Candidates = Iterable[tuple[Labels, Collection[BlockKey]]]


class Forgotten:
    """Blocks that nobody finds any more, and what of them has been given up so far.

    `deletion` has their objects in tiers; all that is known has been given up when `is_walked`. Where
    `places` limit it, `keys` and `found` are those that lay there, and `meant` all that were looked for.
    """

    def __init__(self, reason: str, places: Collection[str] | None = None) -> None:
        self.reason = reason
        self.places = places
        self.keys: set[BlockKey] = set()
        # Those that were not known here.
        self.found: set[BlockKey] = set()
        self.meant: set[BlockKey] = set()
        self.pinned: set[BlockKey] = set()
        self.num_device_bytes = 0
        self.num_in_use = 0
        self.num_places = self.num_held_places = 0
        self.is_walked = False
        self.deletion = Deletion()

    @property
    def is_done(self) -> bool:
        """Whether nothing of it lies anywhere."""
        return self.deletion.is_done

    def note_found(self, deleted: Iterable[StoredKey]) -> None:
        """A tier had objects of these blocks, which are gone now."""
        self.found.update(BlockKey(one[:-1]) for one in deleted)


@dataclass(frozen=True, slots=True)
class _Walk:
    """A purge on its way through the register."""

    forgotten: Forgotten
    tombstone: Tombstone
    slices: Iterator[list[BlockKey]]


class Forgetting:
    """Gives up blocks; `on_forgotten` is told which. For the thread that owns the books."""

    def __init__(
        self,
        lifetimes: Lifetimes,
        places: Places,
        holds: PinHolds,
        below: Hierarchy | None,
        on_forgotten: Callable[[Collection[BlockKey]], None],
    ) -> None:
        self._lifetimes = lifetimes
        self._register = lifetimes.register
        self._places = places
        self._holds = holds
        self._below = below
        self._on_forgotten = on_forgotten
        # In the order in which they began.
        self._walks: list[_Walk] = []

    @property
    def is_walking(self) -> bool:
        """Whether there are blocks that are meant and not given up."""
        return bool(self._walks)

    def begin(self, query: Query, reason: str) -> Forgotten:
        """Forget what a query means of what is known, in its places."""
        tombstone = query.tombstone(self._register, self._lifetimes.clock())
        candidates = query.candidates(self._register)
        spares = None if query.include_pinned else query.spares
        return self._begin(Forgotten(reason, query.tiers), tombstone, candidates, spares)

    def expire(self) -> Forgotten:
        """Forget what has expired by now."""
        now_s = self._lifetimes.clock()
        tombstone = Tombstone(lambda labels: labels.ends_at <= now_s)
        return self._begin(Forgotten("expired"), tombstone, self._register.due(now_s))

    def begin_keys(self, keys: Collection[BlockKey], reason: str) -> Forgotten:
        """Forget these blocks, all of which have labels."""
        own = frozenset(keys)
        tombstone = Tombstone(lambda _: True, own.__contains__)
        return self._begin(Forgotten(reason), tombstone, self._register.of_keys(own))

    def at_once(
        self, keys: Collection[BlockKey], reason: str, places: Collection[str] | None = None
    ) -> Forgotten:
        """Forget these, which may be unknown, in `places` ("device", names of tiers; all of them)."""
        forgotten, rest = Forgotten(reason, places), list(keys)
        for at in range(0, len(rest), _SLICE):
            self._forget(forgotten, rest[at : at + _SLICE])
        forgotten.deletion.end_job()
        return forgotten

    def revive(self, keys: Sequence[BlockKey]) -> None:
        """A request has computed these anew: what they were before goes now, and not when its turn comes.

        On the device the content is the same, and stays.
        """
        for walk in list(self._walks):
            if walk.forgotten.places is None:
                own = [key for key in keys if self._register.is_under(walk.tombstone, key)]
                self._forget_everywhere(walk.forgotten, own)
                walk.forgotten.keys.update(own)
                self._delete(walk.forgotten, own)

    def planned(self, query: Query) -> Bits[PurgeReceipt]:
        """What `begin` would forget."""
        matched = match(query, self._register, self._lifetimes.clock())
        keys = list(matched.keys)
        there: set[BlockKey] = set()
        num_bytes = num_in_use = 0
        stored = Counter[str]()
        for at in range(0, len(keys), _SLICE):
            some = keys[at : at + _SLICE]
            num_in_use += self.num_in_use(some)
            if query.tiers is None or DEVICE in query.tiers:
                there.update(self._on_device(some))
                num_bytes += self._device_bytes(some)
            for tier in () if self._below is None else self._below.stack.tiers:
                if query.tiers is None or tier.name in query.tiers:
                    num_bytes += self._count_stored(tier, some, stored, there)
            yield
        num_deleted = len(keys) if query.tiers is None else len(there)
        return PurgeReceipt(
            matched=num_deleted + matched.num_pinned,
            deleted=num_deleted,
            freed_bytes=num_bytes,
            skipped_pinned=matched.num_pinned,
            in_use=num_in_use,
            stored=dict(stored),
            dry_run=True,
        )

    def num_in_use(self, keys: Collection[BlockKey]) -> int:
        """How many of these blocks requests hold on the device."""
        pinned = self._holds.holders()
        in_use: set[BlockKey] = set()
        for group, ledger in enumerate(self._places.ledgers):
            get, num_holders = ledger.get, ledger.pool.num_holders
            for key in keys:
                block = get(key)
                if block is not None and num_holders(block) > ((group, block) in pinned):
                    in_use.add(key)
        return len(in_use)

    def poll(self, *, is_busy: bool) -> None:
        """Go on for a few milliseconds."""
        until_s = thread_time() + (_BUSY_S if is_busy else _IDLE_S)
        while self._walks:
            self._go_on(self._walks[0])
            if thread_time() > until_s:
                return

    def finish(self) -> None:
        """Give up all that is to be given up."""
        while self._walks:
            self._go_on(self._walks[0])

    # --- parts -----------------------------------------------------------------------------------

    def _begin(
        self,
        forgotten: Forgotten,
        tombstone: Tombstone,
        candidates: Candidates,
        spares: Callable[[Labels], bool] | None = None,
    ) -> Forgotten:
        # What goes from some places only is still served from the others.
        if forgotten.places is None:
            self._register.bury(tombstone)
        else:
            self._register.number(tombstone)
        slices = self._slices(forgotten, tombstone, candidates, spares)
        self._walks.append(_Walk(forgotten, tombstone, slices))
        return forgotten

    def _slices(
        self,
        forgotten: Forgotten,
        tombstone: Tombstone,
        candidates: Candidates,
        spares: Callable[[Labels], bool] | None,
    ) -> Iterator[list[BlockKey]]:
        """What is meant, in slices that are still meant when they come; looking counts as well."""
        found: list[BlockKey] = []
        num_looked = 0
        for labels, keys in candidates:
            num_looked += 1
            is_spared = spares is not None and spares(labels)
            for key in list(keys) if is_spared or tombstone.fits(labels) else ():
                num_looked += 1
                if is_spared:
                    if tombstone.fits_key is None or tombstone.fits_key(key):
                        forgotten.pinned.add(key)
                elif self._register.is_under(tombstone, key):
                    found.append(key)
                if num_looked >= _SLICE:
                    yield found
                    found, num_looked = [], 0
        yield found

    def _go_on(self, walk: _Walk) -> None:
        found = next(walk.slices, None)
        if found is not None:
            self._forget(walk.forgotten, found)
            return
        self._walks.remove(walk)
        if walk.forgotten.places is None:
            self._register.lift(walk.tombstone)
        walk.forgotten.is_walked = True
        walk.forgotten.deletion.end_job()

    def _forget(self, forgotten: Forgotten, keys: Sequence[BlockKey]) -> None:
        if forgotten.places is None:
            self._forget_everywhere(forgotten, keys)
            self._forget_here(forgotten, keys)
            self._delete(forgotten, keys)
        else:
            self._forget_in_places(forgotten, keys, forgotten.places)

    def _forget_in_places(
        self, forgotten: Forgotten, keys: Sequence[BlockKey], places: Collection[str]
    ) -> None:
        """Of blocks that may lie elsewhere only those that lie there are forgotten, and counted."""
        forgotten.meant.update(keys)
        if DEVICE in places:
            here = self._on_device(keys)
            forgotten.keys.update(here)
            self._lifetimes.tell_gone(here, forgotten.reason)
            self._forget_here(forgotten, here)
        stored = self._stored_keys(keys)
        for at, tier in enumerate(() if self._below is None else self._below.stack.tiers):
            assert self._below is not None
            if tier.name in places:
                note = forgotten.note_found
                self._below.deletions.add_found(forgotten.deletion, stored, at, note)

    def _device_bytes(self, keys: Iterable[BlockKey]) -> int:
        num_bytes = 0
        for ledger in self._places.ledgers:
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            num_bytes += ledger.num_bytes(blocks, self._places.spec.block_size)
        return num_bytes

    def _count_stored(
        self, tier: Tier, keys: Sequence[BlockKey], stored: Counter[str], there: set[BlockKey]
    ) -> int:
        """Bytes of the objects that a tier has of these, which are counted."""
        assert self._below is not None
        num_bytes = 0
        for group in range(len(self._places.ledgers)):
            found = tier.find([stored_key(key, group) for key in keys])
            own = [key for key, one in zip(keys, found, strict=True) if one is Presence.PRESENT]
            there.update(own)
            num_bytes += len(own) * self._below.object_bytes(group)
            if own:
                stored[tier.name] += len(own)
        return num_bytes

    def _on_device(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        gets = [ledger.get for ledger in self._places.ledgers]
        return [key for key in keys if any(get(key) is not None for get in gets)]

    def _forget_everywhere(self, forgotten: Forgotten, keys: Sequence[BlockKey]) -> None:
        self._register.forget(keys)
        self._holds.let_go(keys)
        self._on_forgotten(keys)
        if self._below is not None:
            self._below.relabels.forget(keys)
            self._below.holds.let_go(keys)
        self._lifetimes.tell_gone(keys, forgotten.reason)
        forgotten.keys.update(keys)

    def _forget_here(self, forgotten: Forgotten, keys: Sequence[BlockKey]) -> None:
        forgotten.num_in_use += self.num_in_use(keys)
        for group, ledger in enumerate(self._places.ledgers):
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            if not blocks:
                continue
            forgotten.num_device_bytes += ledger.num_bytes(blocks, self._places.spec.block_size)
            if self._below is not None:
                self._below.before_forgetting(group, blocks)
            freed = self._places.forget(group, blocks)
            forgotten.num_places += len(blocks)
            forgotten.num_held_places += len(blocks) - len(freed)

    def _delete(self, forgotten: Forgotten, keys: Sequence[BlockKey]) -> None:
        if self._below is not None and keys:
            self._below.add_to_deletion(forgotten.deletion, self._stored_keys(keys))

    def _stored_keys(self, keys: Iterable[BlockKey]) -> list[StoredKey]:
        groups = range(len(self._places.ledgers))
        return [stored_key(key, group) for key in keys for group in groups]
