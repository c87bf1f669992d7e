"""What this process knows of a store that it shares with others: its own writes, counts, and what it saw.

Sizes are those of its own puts and deletes, with all that is behind an object: what others write, and what
the server evicts, is not in them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome, TierStats
from kvkeep.tiers.deadlines import Deadline

__all__ = ["RemoteBooks"]

# About 10 MB; a key that fell out costs one needless upload at the most.
_MAX_SEEN = 1 << 16


@dataclass(slots=True)
class _Write:
    """A put under way, whose object may be deleted meanwhile."""

    num_bytes: int
    is_deleted: bool = False


class RemoteBooks:
    """Counts, writes in flight and keys seen there lately. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = Lock()
        self._writing: dict[StoredKey, _Write] = {}
        self._seen: dict[StoredKey, None] = {}
        # Bytes of each get under way, which the reader enters and takes out himself: the lock and two calls
        # would be a tenth of what a small get costs.
        self.deadline_to_reading: dict[Deadline, int] = {}
        self._misses: Counter[MissCause] = Counter()
        self._puts: Counter[PutOutcome] = Counter()
        self._kept_bytes = 0
        self._num_kept = 0
        self.num_unreached = 0

    @property
    def used_bytes(self) -> int:
        """Bytes put and not deleted by this process, those being written included."""
        return self._kept_bytes + self._writing_bytes()

    def is_writing(self, key: StoredKey) -> bool:
        """Whether a put of the key is under way."""
        return key in self._writing

    def presence(self, key: StoredKey, *, is_there: bool) -> Presence:
        """What is known of a key that the store has, or has not."""
        if key in self._writing:
            return Presence.IN_FLIGHT
        return Presence.PRESENT if is_there else Presence.ABSENT

    def has_seen(self, key: StoredKey) -> bool:
        """Whether it was there when last looked at; it may be gone."""
        return key in self._seen

    def see(self, keys: Iterable[StoredKey]) -> None:
        """Remember that these are there."""
        with self._lock:
            for key in keys:
                self._seen[key] = None
            self._forget_oldest()

    def miss(self, key: StoredKey, miss: Miss) -> Miss:
        """Count a miss."""
        with self._lock:
            self._misses[miss.cause] += 1
            self._seen.pop(key, None)
        return miss

    def count_put(self, outcome: PutOutcome) -> PutOutcome:
        """Count a put that changed nothing."""
        with self._lock:
            self._puts[outcome] += 1
        return outcome

    def begin_write(self, key: StoredKey, num_bytes: int) -> bool:
        """Mark a key as in flight; False where it is already."""
        write = _Write(num_bytes)
        return self._writing.setdefault(key, write) is write

    def end_write(self, key: StoredKey, num_bytes: int, outcome: PutOutcome) -> bool:
        """Count the outcome; whether the object was deleted meanwhile, and has to go from the store."""
        with self._lock:
            write = self._writing.pop(key)
            self._puts[outcome] += 1
            if outcome is PutOutcome.STORED:
                self._kept_bytes += num_bytes
                self._num_kept += 1
            if outcome is PutOutcome.STORED or outcome is PutOutcome.PRESENT:
                self._seen[key] = None
                self._forget_oldest()
            else:
                self._seen.pop(key, None)
            return write.is_deleted

    def delete(
        self, keys: Sequence[StoredKey], forget: Callable[[Sequence[StoredKey]], int]
    ) -> int:
        """Delete objects by `forget`, which says how many the store had, and those that are being written."""
        writing = set(self._delete_writing(keys))
        if writing:
            # They count once, whether the store has one of before or not.
            forget(sorted(writing))
        return len(writing) + forget([key for key in keys if key not in writing])

    def count_deleted(self, num_objects: int, num_bytes: int) -> None:
        """Count objects as gone, which others may have put."""
        with self._lock:
            self._num_kept = max(0, self._num_kept - num_objects)
            self._kept_bytes = max(0, self._kept_bytes - num_bytes)

    def count_unreached(self) -> None:
        """Count a delete, or a listing, that did not reach all that it meant."""
        with self._lock:
            self.num_unreached += 1

    def stats(self) -> TierStats:
        """Counters since the start."""
        with self._lock:
            in_use = sum(list(self.deadline_to_reading.values())) + self._writing_bytes()
            return TierStats(
                name=self._name,
                capacity_bytes=None,
                in_use_bytes=in_use,
                reusable_bytes=max(0, self.used_bytes - in_use),
                free_bytes=None,
                num_objects=self._num_kept,
                num_evictions=0,
                misses={str(cause): count for cause, count in self._misses.items()},
                puts={str(outcome): count for outcome, count in self._puts.items()},
            )

    def _delete_writing(self, keys: Sequence[StoredKey]) -> list[StoredKey]:
        """Those of the keys that are being written, and go when that ends."""
        with self._lock:
            found = []
            for key in keys:
                self._seen.pop(key, None)
                write = self._writing.get(key)
                if write is not None and not write.is_deleted:
                    write.is_deleted = True
                    found.append(key)
        return found

    def _writing_bytes(self) -> int:
        return sum(write.num_bytes for write in list(self._writing.values()))

    def _forget_oldest(self) -> None:
        while len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]
