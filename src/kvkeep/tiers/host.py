"""Host memory below the device: one piece taken at the start, objects in runs of its pages."""

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Condition, Lock

import numpy as np
from numpy.typing import NDArray

from kvkeep.errors import ConfigError
from kvkeep.policies import EvictionPolicy, make_policy
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    RankOf,
    Spill,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.catalog import Catalog, Evicted
from kvkeep.tiers.host_pages import PageRuns, Run
from kvkeep.tiers.tally import Tally

__all__ = ["HostTier", "map_memory"]

Bytes = NDArray[np.uint8]
# Objects are a multiple of it already (stored_form), so that nothing is lost to rounding.
_PAGE_BYTES = 4096


def map_memory(num_bytes: int) -> memoryview:
    """Memory of this process, taken from the system when it is first written to, in huge pages if it can."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


@dataclass(slots=True)
class _Place:
    """Where an object lies: `views` are its bytes, in order; `got` is what a get of it answers.

    Of these only `got` changes, with the labels.
    """

    num_bytes: int
    runs: tuple[Run, ...]
    views: tuple[Bytes, ...]
    got: Got


class _Slab:
    """Pages of memory, given out as places. Thread-safe."""

    def __init__(self, memory: memoryview) -> None:
        self._memory: Bytes = np.frombuffer(memory, np.uint8)
        self._runs = PageRuns(memory.nbytes // _PAGE_BYTES)
        self._lock = Lock()
        self._freed = Condition(self._lock)
        self._num_waiting = 0

    def allocate(self, num_bytes: int) -> _Place:
        """A place for an object; waits for pages whose admitted owner is still giving them up."""
        num_pages = _taken(num_bytes, 0) // _PAGE_BYTES
        with self._lock:
            if self._runs.num_free < num_pages:
                self._num_waiting += 1
                self._freed.wait_for(lambda: self._runs.num_free >= num_pages)
                self._num_waiting -= 1
            runs = self._runs.take(num_pages)
        return self._place(num_bytes, runs)

    def reuse(self, place: _Place, num_bytes: int) -> _Place:
        """The same pages for an object that needs as many."""
        return place if place.num_bytes == num_bytes else self._place(num_bytes, place.runs)

    def free(self, place: _Place) -> None:
        """Take a place back."""
        with self._lock:
            self._runs.give_back(place.runs)
            if self._num_waiting:
                self._freed.notify_all()

    def close(self) -> None:
        """Give the memory back as soon as nobody copies to or from it."""
        self._memory = self._memory[:0].copy()

    def _place(self, num_bytes: int, runs: tuple[Run, ...]) -> _Place:
        if len(runs) == 1:
            begin = runs[0].first * _PAGE_BYTES
            view = self._memory[begin : begin + num_bytes]
            return _Place(num_bytes, runs, (view,), Got(num_bytes))
        views, rest = [], num_bytes
        for run in runs:
            begin = run.first * _PAGE_BYTES
            size = min(rest, run.num_pages * _PAGE_BYTES)
            views.append(self._memory[begin : begin + size])
            rest -= size
        return _Place(num_bytes, runs, tuple(views), Got(num_bytes))


class HostTier(Tier):
    """Objects in host memory, at most `capacity_bytes`, which are taken from the system as they fill.

    `policy` is a name or a policy of its own. `allocate` gives the memory, once: page-locked memory, for
    copies to a CUDA device, comes in here. An object takes whole pages of 4096 bytes; `used_bytes` counts
    those. `on_evict` is called with bytes and labels of each object that has to go, when the tier does not
    have it any more and before its place is reused, without a lock held; it must not put into this tier.
    Copies of 500 bytes and more run beside other Python threads. Raises ConfigError for a capacity that
    cannot be.
    """

    capabilities = Capabilities(
        is_local=True, is_persistent=False, is_shared=False, keeps_labels=True
    )

    def __init__(
        self,
        capacity_bytes: int,
        *,
        policy: str | EvictionPolicy[StoredKey] = "lru",
        name: str = "host",
        allocate: Callable[[int], memoryview] = map_memory,
    ) -> None:
        capacity = capacity_bytes // _PAGE_BYTES * _PAGE_BYTES
        if capacity <= 0:
            raise ConfigError(
                f"capacity_bytes={capacity_bytes!r} is less than a page; give at least {_PAGE_BYTES}"
            )
        if isinstance(policy, str):
            policy = make_policy(policy, by_content=True)
        try:
            memory = allocate(capacity)
        except (OSError, OverflowError, MemoryError) as error:
            raise ConfigError(
                f"capacity_bytes={capacity_bytes!r} cannot be had from the system ({error}); give less"
            ) from error
        self.name = name
        self.on_evict: Spill | None = None
        self._slab = _Slab(memory)
        self._catalog = Catalog(capacity, policy, on_free=self._free, taken=_taken)
        # Keys of the catalog and of `_key_to_place` change together. Taken before the catalog's own lock.
        self._lock = Lock()
        self._key_to_place: dict[StoredKey, _Place] = {}
        self._tally = Tally()
        self._is_open = True

    @property
    def capacity_bytes(self) -> int:
        return self._catalog.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._catalog.used_bytes

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        return self._catalog.find(keys)

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        with self._lock:
            place = self._key_to_place.get(key)
            is_there = place is not None and self._catalog.acquire(key) is not None
        if place is None or not is_there:
            if self._is_open:
                return self._tally.miss(MissCause.ABSENT)
            return self._tally.miss(MissCause.UNAVAILABLE, "closed")
        try:
            wanted = sum([buffer.nbytes for buffer in buffers])
            if wanted == place.num_bytes:
                _fetch(place, buffers)
                return place.got
        finally:
            with self._lock:
                self._catalog.release(key)
        return self._tally.miss(MissCause.SHORT, f"{place.num_bytes} bytes, not {wanted}")

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        if not self._is_open:
            return self._tally.put(PutOutcome.FAILED)
        with self._lock:
            admission = self._catalog.begin(key, num_bytes, labels)
            if admission is None:
                is_absent = self._catalog.find([key]) == [Presence.ABSENT]
                return self._tally.put(PutOutcome.REFUSED if is_absent else PutOutcome.PRESENT)
            victims = [(item, self._key_to_place.pop(item.key)) for item in admission.evicted]
        place = None
        try:
            place = self._make_place(num_bytes, victims)
            is_whole = _fill(place, parts)
        except BaseException:
            self._abort(key, place)
            raise
        if not is_whole:
            self._abort(key, place)
            return self._tally.put(PutOutcome.FAILED)
        if place.got.labels != labels:
            place.got = Got(num_bytes, labels)
        with self._lock:
            self._key_to_place[key] = place
            if not self._catalog.commit(key):
                # Stored, and deleted by somebody else meanwhile.
                self._slab.free(self._key_to_place.pop(key))
        return self._tally.put(PutOutcome.STORED)

    def delete(self, keys: Sequence[StoredKey]) -> int:
        with self._lock:
            return self._catalog.delete(keys)

    def objects(self) -> Iterator[StoredObject]:
        return iter(self._catalog.objects())

    def stats(self) -> TierStats:
        with self._lock:
            return self._tally.stats(self.name, self._catalog)

    def touch(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.touch(keys)

    def labels(self, key: StoredKey) -> bytes | None:
        return self._catalog.labels(key)

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        with self._lock:
            is_done = self._catalog.relabel(key, labels)
            if is_done:
                place = self._key_to_place[key]
                place.got = Got(place.num_bytes, labels)
        return is_done

    def labelled(self) -> Iterator[Labelled]:
        return iter(self._catalog.labelled())

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        return self._catalog.hold(keys)

    def let_go(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.let_go(keys)

    def rank_by(self, rank_of: RankOf) -> None:
        self._catalog.rank_by(rank_of)

    def close(self) -> None:
        with self._lock:
            self._is_open = False
            self._catalog.delete([item.key for item in self._catalog.objects()])
        self._slab.close()

    def _make_place(self, num_bytes: int, victims: Sequence[tuple[Evicted, _Place]]) -> _Place:
        """A place for a new object, once the victims for it were shown; theirs are free, whatever happens."""
        kept, shown = None, 0
        try:
            for item, place in victims:
                if self.on_evict is not None:
                    views = [view.data.toreadonly() for view in place.views]
                    self.on_evict(item.key, views, item.labels)
                shown += 1
            if victims and _taken(victims[0][1].num_bytes, 0) == _taken(num_bytes, 0):
                kept = victims[0][1]
        finally:
            for _, place in victims:
                if place is not kept:
                    self._slab.free(place)
        return self._slab.allocate(num_bytes) if kept is None else self._slab.reuse(kept, num_bytes)

    def _abort(self, key: StoredKey, place: _Place | None) -> None:
        with self._lock:
            self._catalog.abort(key)
        if place is not None:
            self._slab.free(place)

    def _free(self, item: StoredObject) -> None:
        """The last reader of a deleted object has gone; called with the lock held."""
        self._slab.free(self._key_to_place.pop(item.key))


def _taken(num_bytes: int, num_label_bytes: int) -> int:
    """Bytes of whole pages, one at least; labels lie elsewhere."""
    del num_label_bytes
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES or _PAGE_BYTES


def _fetch(place: _Place, buffers: Sequence[memoryview]) -> None:
    """Copy an object into buffers that are as long."""
    if len(place.views) > 1:
        _pour(place.views, _arrays(buffers))
        return
    (view,), begin = place.views, 0
    for buffer in buffers:
        end = begin + buffer.nbytes
        if end > begin:
            # numpy lets other threads run meanwhile, which slices of memoryviews do not.
            np.frombuffer(buffer, np.uint8)[:] = view[begin:end]
        begin = end


def _fill(place: _Place, parts: Iterable[memoryview]) -> bool:
    """Copy parts into a place; False where they are not as long."""
    if len(place.views) > 1:
        return _pour(_arrays(parts), place.views) == place.num_bytes
    (view,), begin = place.views, 0
    for part in parts:
        end = begin + part.nbytes
        if end > view.size:
            return False
        if end > begin:
            view[begin:end] = np.frombuffer(part, np.uint8)
        begin = end
    return begin == place.num_bytes


def _arrays(parts: Iterable[memoryview]) -> Iterator[Bytes]:
    """The same memory as arrays of bytes, empty parts left out."""
    for part in parts:
        if part.nbytes:
            yield np.frombuffer(part, np.uint8)


def _pour(sources: Iterable[Bytes], targets: Iterable[Bytes]) -> int:
    """Copy sources into targets, both in order; the bytes that sources had, or one more than fits."""
    rest, num_bytes = iter(targets), 0
    target: Bytes | None = None
    for source in sources:
        left = source
        while left.size:
            if target is None or not target.size:
                target = next(rest, None)
                if target is None:
                    return num_bytes + 1
            size = min(left.size, target.size)
            target[:size] = left[:size]
            left, target = left[size:], target[size:]
            num_bytes += size
    return num_bytes
