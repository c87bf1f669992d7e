"""What a bounded tier holds, without its bytes: sizes, writes in flight, and what goes first.

Host, disk and the tiers of trace replay are media around a Catalog, so that one class counts bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from kvkeep.policies import EvictionPolicy, Ranked
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Labelled, Presence, RankOf, StoredObject

__all__ = ["Admission", "Catalog", "Evicted"]


class Evicted(NamedTuple):
    """An object that has to go, and the labels that it had.

    A NamedTuple because a full tier makes one for each put, and a frozen dataclass takes far longer.
    """

    key: StoredKey
    num_bytes: int
    labels: bytes


@dataclass(frozen=True, slots=True)
class Admission:
    """Room for a new object: `evicted` are those that have to go before it is written."""

    evicted: tuple[Evicted, ...]


_NOTHING_EVICTED = Admission(())


@dataclass(slots=True)
class _Record:
    num_bytes: int
    taken_bytes: int
    labels: bytes = b""
    is_complete: bool = False
    num_readers: int = 0
    is_deleted: bool = False
    # Held objects have one reader more.
    is_held: bool = False


@dataclass(slots=True)
class _Totals:
    used_bytes: int = 0
    in_use_bytes: int = 0
    num_evictions: int = 0
    key_to_record: dict[StoredKey, _Record] = field(default_factory=dict)


def _exactly(num_bytes: int, num_label_bytes: int) -> int:
    del num_label_bytes
    return num_bytes


class Catalog:
    """Keys, sizes and the order of eviction; see Tier for the life of an object. Thread-safe.

        begin ──> in flight ──commit──> complete ──acquire──> being read ──release──> complete
                      └─────abort────> gone <──delete or eviction────┘ (after its last reader)

    An object in flight, held or being read is never evicted. `on_free` is called, without the lock, with what
    is gone for good, so that a medium frees its place after the last reader. `taken` says what an object of
    so many bytes, with so many bytes of labels, takes of the capacity: all totals count that.
    """

    def __init__(
        self,
        capacity_bytes: int,
        policy: EvictionPolicy[StoredKey],
        *,
        on_free: Callable[[StoredObject], None] | None = None,
        taken: Callable[[int, int], int] = _exactly,
    ) -> None:
        assert capacity_bytes > 0
        self.capacity_bytes = capacity_bytes
        self._policy = Ranked(policy)
        self._rank_of: RankOf | None = None
        self._on_free = on_free
        self._taken = taken
        self._lock = Lock()
        self._totals = _Totals()

    @property
    def used_bytes(self) -> int:
        """Bytes of all objects, in flight and being read included."""
        return self._totals.used_bytes

    @property
    def in_use_bytes(self) -> int:
        """Bytes of objects being written or read, or held."""
        return self._totals.in_use_bytes

    @property
    def complete_bytes(self) -> int:
        """Bytes of all objects that are not in flight."""
        with self._lock:
            records = self._totals.key_to_record.values()
            return sum([record.taken_bytes for record in records if record.is_complete])

    @property
    def num_evictions(self) -> int:
        """Objects that went to make room."""
        return self._totals.num_evictions

    def __len__(self) -> int:
        return len(self._totals.key_to_record)

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        """What is known of each key; what is deleted is absent, also while somebody still reads it."""
        records = self._totals.key_to_record
        found = []
        for key in keys:
            record = records.get(key)
            if record is None or record.is_deleted:
                found.append(Presence.ABSENT)
            else:
                found.append(Presence.PRESENT if record.is_complete else Presence.IN_FLIGHT)
        return found

    def num_bytes(self, key: StoredKey) -> int | None:
        """The size of an object, None where there is none."""
        record = self._totals.key_to_record.get(key)
        return None if record is None else record.num_bytes

    def objects(self) -> list[StoredObject]:
        """All complete objects."""
        with self._lock:
            return [
                StoredObject(key, record.num_bytes)
                for key, record in self._totals.key_to_record.items()
                if record.is_complete
            ]

    def labelled(self) -> list[Labelled]:
        """All complete objects with their labels."""
        with self._lock:
            return [
                Labelled(key, record.num_bytes, record.labels)
                for key, record in self._totals.key_to_record.items()
                if record.is_complete
            ]

    def begin(self, key: StoredKey, num_bytes: int, labels: bytes = b"") -> Admission | None:
        """Take room for an object in flight, evicting others.

        None, and no change, when the key is there already, or where what can be evicted is not enough. The
        caller frees the places of `evicted`, whose records are gone.
        """
        taken_bytes = self._taken(num_bytes, len(labels))
        with self._lock:
            admission = self._admit(key, taken_bytes)
            if admission is not None:
                self._totals.key_to_record[key] = _Record(num_bytes, taken_bytes, labels)
                self._totals.in_use_bytes += taken_bytes
            return admission

    def rank_by(self, rank_of: RankOf) -> None:
        """Let complete objects of a lower rank go before all others, now and from now on."""
        with self._lock:
            self._rank_of = rank_of
            for key, record in self._totals.key_to_record.items():
                if record.is_complete:
                    self._rank(key, record)

    def evict(self, num_bytes: int) -> Admission:
        """Let so many bytes go that nobody uses, or all there are; the caller frees their places."""
        with self._lock:
            return Admission(self._evict(num_bytes))

    def commit(self, key: StoredKey) -> bool:
        """Make an object in flight complete; False where it was deleted meanwhile, and is gone now."""
        with self._lock:
            record = self._totals.key_to_record[key]
            assert not record.is_complete
            if record.is_deleted:
                self._remove(key, record)
                return False
            record.is_complete = True
            self._totals.in_use_bytes -= record.taken_bytes
            self._rank(key, record)
            self._policy.insert([key])
            return True

    def abort(self, key: StoredKey) -> None:
        """Forget an object in flight."""
        with self._lock:
            self._remove(key, self._totals.key_to_record[key])

    def restore(self, key: StoredKey, num_bytes: int, labels: bytes = b"") -> Admission | None:
        """Enter an object that the medium holds from before; as `begin` and `commit` in one."""
        taken_bytes = self._taken(num_bytes, len(labels))
        with self._lock:
            admission = self._admit(key, taken_bytes)
            if admission is not None:
                record = _Record(num_bytes, taken_bytes, labels, is_complete=True)
                self._totals.key_to_record[key] = record
                self._rank(key, record)
                self._policy.insert([key])
            return admission

    def acquire(self, key: StoredKey) -> int | None:
        """Begin to read: until `release` it is not evicted, nor its place freed. Its size, or None."""
        with self._lock:
            record = self._totals.key_to_record.get(key)
            if record is None or not record.is_complete:
                return None
            self._begin_use(key, record)
            return record.num_bytes

    def release(self, key: StoredKey) -> None:
        """End a read; what was deleted meanwhile goes with its last reader."""
        with self._lock:
            freed = self._end_use(key, self._totals.key_to_record[key])
        if freed is not None and self._on_free is not None:
            self._on_free(freed)

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        """Keep complete objects from being evicted until `let_go`; for each, whether it is held now."""
        are_held = []
        with self._lock:
            for key in keys:
                record = self._totals.key_to_record.get(key)
                if record is not None and record.is_complete and not record.is_held:
                    record.is_held = True
                    self._begin_use(key, record)
                are_held.append(record is not None and record.is_held)
        return are_held

    def let_go(self, keys: Sequence[StoredKey]) -> None:
        """Let held objects be evicted again, as used now."""
        with self._lock:
            for key in keys:
                record = self._totals.key_to_record.get(key)
                if record is not None and record.is_held:
                    record.is_held = False
                    self._end_use(key, record)

    def touch(self, keys: Sequence[StoredKey]) -> None:
        """Count a use of the complete ones among these, which lie in chain order."""
        with self._lock:
            present = [key for key in dict.fromkeys(keys) if key in self._policy]
            self._policy.remove(present)
            self._policy.insert(present)

    def delete(self, keys: Sequence[StoredKey]) -> int:
        """Forget objects; those being read or written go when that ends. Returns how many there were."""
        freed, num_deleted = [], 0
        with self._lock:
            for key in keys:
                record = self._totals.key_to_record.get(key)
                if record is None or record.is_deleted:
                    continue
                num_deleted += 1
                if record.is_complete and record.num_readers == record.is_held:
                    if not record.is_held:
                        self._totals.in_use_bytes += record.taken_bytes
                    self._policy.forget([key])
                    self._remove(key, record)
                    freed.append(StoredObject(key, record.num_bytes))
                else:
                    # Still there for its reader, and for nobody else.
                    record.num_readers -= record.is_held
                    record.is_held = record.is_complete = False
                    record.is_deleted = True
        if self._on_free is not None:
            for item in freed:
                self._on_free(item)
        return num_deleted

    def labels(self, key: StoredKey) -> bytes | None:
        """The labels of a complete object, None where there is none."""
        record = self._totals.key_to_record.get(key)
        return None if record is None or not record.is_complete else record.labels

    def relabel(self, key: StoredKey, labels: bytes, *, scratch: StoredKey | None = None) -> bool:
        """Replace the labels of a complete object; False, and no change, without it or without room for them.

        `scratch` in flight, which took the room while they were written, goes in the same moment.
        """
        totals = self._totals
        with self._lock:
            record = totals.key_to_record.get(key)
            if record is None or not record.is_complete:
                return False
            grown = self._taken(record.num_bytes, len(labels)) - record.taken_bytes
            lent = None if scratch is None else totals.key_to_record[scratch]
            room = self.capacity_bytes - totals.used_bytes + (lent.taken_bytes if lent else 0)
            if grown > room:
                return False
            if scratch is not None and lent is not None:
                self._remove(scratch, lent)
            record.labels = labels
            self._rank(key, record)
            record.taken_bytes += grown
            totals.used_bytes += grown
            totals.in_use_bytes += grown if record.num_readers else 0
            return True

    def _rank(self, key: StoredKey, record: _Record) -> None:
        if self._rank_of is not None:
            self._policy.rank((key,), self._rank_of(key, record.labels))

    def _begin_use(self, key: StoredKey, record: _Record) -> None:
        if not record.num_readers:
            self._policy.remove([key])
            self._totals.in_use_bytes += record.taken_bytes
        record.num_readers += 1

    def _end_use(self, key: StoredKey, record: _Record) -> StoredObject | None:
        """End a read or a hold; what is gone with that, and has to be freed."""
        record.num_readers -= 1
        if record.num_readers:
            return None
        if record.is_deleted:
            # Out of the policy since it was used, which may remember it as used again.
            self._policy.forget([key])
            self._remove(key, record)
            return StoredObject(key, record.num_bytes)
        self._totals.in_use_bytes -= record.taken_bytes
        self._policy.insert([key])
        return None

    def _admit(self, key: StoredKey, taken_bytes: int) -> Admission | None:
        """Count a new object, evicting others; None, and no change, where it cannot be."""
        totals = self._totals
        if key in totals.key_to_record or taken_bytes > self.capacity_bytes:
            return None
        missing = taken_bytes - (self.capacity_bytes - totals.used_bytes)
        if missing > totals.used_bytes - totals.in_use_bytes:
            return None
        evicted = self._evict(missing) if missing > 0 else ()
        totals.used_bytes += taken_bytes
        return Admission(evicted) if evicted else _NOTHING_EVICTED

    def _evict(self, num_bytes: int) -> tuple[Evicted, ...]:
        totals, evicted = self._totals, []
        while num_bytes > 0:
            keys = self._policy.evict(1)
            if not keys:
                break
            record = totals.key_to_record.pop(keys[0])
            evicted.append(Evicted(keys[0], record.num_bytes, record.labels))
            totals.used_bytes -= record.taken_bytes
            totals.num_evictions += 1
            num_bytes -= record.taken_bytes
        return tuple(evicted)

    def _remove(self, key: StoredKey, record: _Record) -> None:
        """Take out an object that counts as in use."""
        del self._totals.key_to_record[key]
        self._totals.used_bytes -= record.taken_bytes
        self._totals.in_use_bytes -= record.taken_bytes
