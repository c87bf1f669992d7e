"""Demotion: copies of sealed blocks on their way down, made ahead of time, when idle, or when room is needed.

A copy first takes the bytes into memory of its own, which is quick, and then writes them wherever they
belong, which may not be. Only while the bytes are taken must the block keep its place: `leave_alone` is
called before a place is reused.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from threading import Event, Lock, local
from time import sleep

import numpy as np

from kvkeep.blocks import Entry, stored_key
from kvkeep.cache.base import PayloadStore
from kvkeep.cache.receipts import CopyReport
from kvkeep.cache.stored_blocks import put_block
from kvkeep.spec import BlockId, BlockKey, KVSpec, StoredKey
from kvkeep.tiers.base import Occasion, Presence, PutOutcome, Tier
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Copies", "CopyCounts"]

_log = getLogger(__name__)

_MOST_JOBS = 8
_NUM_THREADS = 2
# Copies of evicted blocks that wait for a slow tier, at the most; what is beyond is forgotten, and counted.
_MOST_STAGED = 16
# While requests run, blocks go down no faster: of what memory can move, some per cent.
_BUSY_BYTES_PER_S = 80e6
# Keys of which it is known that a tier behind a wire has them.
_MOST_REMEMBERED = 2**17
_IS_KEPT = (PutOutcome.STORED, PutOutcome.PRESENT)


@dataclass(slots=True)
class CopyCounts:
    """What went down: blocks by occasion, and those for which there was no room anywhere."""

    blocks_by_occasion: dict[str, int] = field(default_factory=dict)
    num_bytes: int = 0
    num_failed: int = 0
    num_dropped: int = 0


@dataclass(slots=True)
class _Copy:
    """One block on its way down."""

    key: StoredKey
    group: int
    block: BlockId
    entry: Entry
    occasion: Occasion
    labels: bytes
    taken: Event = field(default_factory=Event)
    is_begun: bool = False
    is_abandoned: bool = False
    is_cancelled: bool = False


class Copies:
    """All copies that are under way. Owned by the thread that owns the books, worked on by lanes."""

    def __init__(
        self, spec: KVSpec, payloads: PayloadStore, stack: TierStack, results: Results
    ) -> None:
        self._spec = spec
        self._payloads = payloads
        self._stack = stack
        self._results = results
        self._lane = Lane("copy", num_threads=_NUM_THREADS, max_jobs=_MOST_JOBS)
        self._staging = _Staging()
        self._staged = Lane("demote", num_threads=2, max_jobs=_MOST_STAGED)
        self._copies: dict[StoredKey, _Copy] = {}
        self._lock = Lock()
        self._remembered: OrderedDict[StoredKey, None] = OrderedDict()
        self._evicts_to_memory = _evicts_to_memory(stack)
        self.is_busy = False
        self.counts = CopyCounts()
        # What a block's labels are, whether it may be written anywhere at all, and who hears of it.
        self.labels_of: Callable[[BlockKey], bytes] = _no_labels
        self.may_write: Callable[[StoredKey], bool] = _always
        self.on_copied: Callable[[BlockKey, Mapping[int, PutOutcome], bytes], None] | None = None

    @property
    def num_under_way(self) -> int:
        """Blocks being copied."""
        return len(self._copies)

    @property
    def report(self) -> CopyReport:
        """What went down, and what was lost on the way, between tiers too."""
        return CopyReport(
            blocks_by_occasion=dict(self.counts.blocks_by_occasion),
            num_failed=self.counts.num_failed,
            num_dropped=self.counts.num_dropped + self._stack.num_dropped,
        )

    def has_copy(self, key: StoredKey) -> bool:
        """Whether some tier has the block, as far as is known without asking over a wire."""
        if not self.may_write(key):
            return False
        if key in self._remembered:
            return True
        sighting = self._stack.find([key], self._stack.local).get(key)
        return sighting is not None and sighting.presence is Presence.PRESENT

    def remember(self, key: StoredKey) -> None:
        """A tier behind a wire has the block."""
        self._remembered[key] = None
        self._remembered.move_to_end(key)
        if len(self._remembered) > _MOST_REMEMBERED:
            self._remembered.popitem(last=False)

    def unremember(self, keys: Sequence[StoredKey]) -> None:
        """Tiers behind wires have these no more."""
        for key in keys:
            self._remembered.pop(key, None)

    def wants(self, key: StoredKey, occasion: Occasion) -> bool:
        """Whether a copy on this occasion would go anywhere."""
        if not self.may_write(key):
            return False
        among = self._stack.local if key in self._remembered else None
        return self._stack.wants(key, occasion, among)

    def begin(
        self,
        group: int,
        block: BlockId,
        entry: Entry,
        occasion: Occasion,
        then: Callable[[], None],
    ) -> bool:
        """Copy a sealed block down beside compute, then run `then`; False when there is no free lane."""
        key = stored_key(entry.key, group)
        if key in self._copies:
            return False
        copy = _Copy(key, group, block, entry, occasion, self.labels_of(entry.key))
        if not self._lane.submit(partial(self._work, copy, then)):
            return False
        self._copies[key] = copy
        return True

    def leave_alone(self, group: int, entries: Sequence[Entry]) -> None:
        """See to it that no copy reads these blocks' places any more.

        One that has begun is waited for, which takes as long as a copy in memory; one that has not, because
        it waits for a tier that is slow, never will.
        """
        if not self._copies:
            return
        for entry in entries:
            copy = self._copies.get(stored_key(entry.key, group))
            if copy is None:
                continue
            with self._lock:
                copy.is_abandoned = not copy.is_begun
            if copy.is_begun:
                copy.taken.wait()

    def demote(self, group: int, blocks: Sequence[BlockId], entries: Sequence[Entry]) -> None:
        """What is evicted goes down before its place is reused, unless it lies below already."""
        for block, entry in zip(blocks, entries, strict=True):
            key = stored_key(entry.key, group)
            copy = self._copies.get(key)
            if (copy is not None and not copy.is_abandoned) or self.has_copy(key):
                continue
            if not self.may_write(key):
                continue
            if self._evicts_to_memory:
                payload, labels = self._payloads.view(group, block), self.labels_of(entry.key)
                outcomes = self._put(group, entry, payload, Occasion.EVICTED, labels)
                if self.on_copied is not None:
                    self.on_copied(entry.key, outcomes, labels)
            elif not self._stage(key, group, block, entry):
                self.counts.num_dropped += 1

    def is_under_way(self, key: StoredKey) -> bool:
        """Whether the block is being copied."""
        return key in self._copies

    def is_cancelled(self, key: StoredKey) -> bool:
        """Whether a copy of what has been forgotten is still under way."""
        copy = self._copies.get(key)
        return copy is not None and copy.is_cancelled

    def cancel(self, keys: Sequence[StoredKey]) -> None:
        """The content of these is forgotten: what is under way is not to stay."""
        with self._lock:
            for key in keys:
                self._remembered.pop(key, None)
                if key in self._copies:
                    self._copies[key].is_cancelled = True

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self._lane.close()
        self._staged.close()

    def _stage(self, key: StoredKey, group: int, block: BlockId, entry: Entry) -> bool:
        """Take the bytes now and write them later: the tiers below are slow."""
        copy = _Copy(key, group, block, entry, Occasion.EVICTED, self.labels_of(entry.key))
        if self._staged.num_waiting >= _MOST_STAGED or key in self._copies:
            return False
        view = self._payloads.view(group, block)
        payload = np.frombuffer(view, np.uint8).copy().data
        copy.is_begun = True
        copy.taken.set()
        self._copies[key] = copy
        self._staged.submit(partial(self._write, copy, payload, _nothing))
        return True

    def _work(self, copy: _Copy, then: Callable[[], None]) -> None:
        """On one of the lane's threads."""
        with self._lock:
            copy.is_begun = not copy.is_abandoned
        if copy.is_abandoned:
            self._results.add(partial(self._finish, copy, {}, _nothing))
            return
        try:
            view = self._payloads.view(copy.group, copy.block)
            payload = self._staging.take(view)
        finally:
            copy.taken.set()
        self._write(copy, payload, then)
        if self.is_busy:
            sleep(payload.nbytes * _NUM_THREADS / _BUSY_BYTES_PER_S)

    def _write(self, copy: _Copy, payload: memoryview, then: Callable[[], None]) -> None:
        outcomes: dict[int, PutOutcome] = {}
        try:
            outcomes = self._put(copy.group, copy.entry, payload, copy.occasion, copy.labels)
        except Exception:  # noqa: BLE001
            # A tier of somebody else's may raise anything; to us its put has failed.
            _log.exception("copying a block down failed")
        finally:
            self._results.add(partial(self._finish, copy, outcomes, then))

    def _put(
        self,
        group: int,
        entry: Entry,
        payload: memoryview,
        occasion: Occasion,
        labels: bytes,
    ) -> dict[int, PutOutcome]:
        layout = self._payloads.layout_name(group)
        return put_block(self._stack, self._spec, group, entry, payload, layout, occasion, labels)

    def _finish(
        self, copy: _Copy, outcomes: dict[int, PutOutcome], then: Callable[[], None]
    ) -> None:
        """On the owner's thread."""
        with self._lock:
            del self._copies[copy.key]
        if copy.is_cancelled:
            self._stack.delete([copy.key])
        if copy.is_cancelled or copy.is_abandoned:
            return
        kept = [at for at, outcome in outcomes.items() if outcome in _IS_KEPT]
        if not kept:
            self.counts.num_failed += 1
            return
        if any(at in self._stack.distant for at in kept):
            self.remember(copy.key)
        if self.on_copied is not None:
            self.on_copied(copy.entry.key, outcomes, copy.labels)
        occasions = self.counts.blocks_by_occasion
        occasions[copy.occasion] = occasions.get(copy.occasion, 0) + 1
        then()


class _Staging(local):
    """Memory of each thread for one block, used again: fresh memory costs as much as the copy."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, payload: memoryview) -> memoryview:
        """The same bytes in memory of this thread, until the next call."""
        if self._buffer.nbytes < payload.nbytes:
            self._buffer = np.empty(payload.nbytes, np.uint8)
        taken = self._buffer[: payload.nbytes]
        # Unlike bytearray(), numpy lets other threads run meanwhile.
        np.copyto(taken, np.frombuffer(payload, np.uint8))
        return taken.data


def _is_memory(tier: Tier) -> bool:
    return tier.capabilities.is_local and not tier.capabilities.is_persistent


def _evicts_to_memory(stack: TierStack) -> bool:
    """Whether what is evicted goes to a tier that takes it as fast as memory does."""
    takers = [floor.tier for floor in stack.floors if Occasion.EVICTED in floor.write_on]
    return bool(takers) and _is_memory(takers[0])


def _nothing() -> None:
    """What follows a demotion."""


def _no_labels(_key: BlockKey) -> bytes:
    return b""


def _always(_key: StoredKey) -> bool:
    return True
