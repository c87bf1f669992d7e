"""The contract of a tier: media below the device, where blocks lie as objects, by StoredKey.

A tier knows nothing of K/V: an object is bytes of a known length, written once under the name of its content
and never changed. What the bytes mean, and whether they are right, is `stored_form`'s business, so that one
check guards every medium. Any thread may call any method.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import NamedTuple, Self, TypeAlias

from kvkeep.spec import StoredKey

__all__ = [
    "Capabilities",
    "Got",
    "LabelChange",
    "Labelled",
    "Miss",
    "MissCause",
    "Occasion",
    "Presence",
    "PutOutcome",
    "RankOf",
    "Spill",
    "StoredObject",
    "Tier",
    "TierStats",
]

# What a tier calls with the bytes and the labels of an object that it evicts.
Spill: TypeAlias = Callable[[StoredKey, Sequence[memoryview], bytes], None]
# What an object's labels are to become, by those that it has; None to leave them.
LabelChange: TypeAlias = Callable[[StoredKey, bytes], bytes | None]
# The rank of an object, by its labels: those of a lower rank are evicted first.
RankOf: TypeAlias = Callable[[StoredKey, bytes], int]


class Presence(StrEnum):
    """What a tier knows of a key."""

    ABSENT = "absent"
    PRESENT = "present"
    IN_FLIGHT = "in flight"  # being written: there soon, or not at all


class MissCause(StrEnum):
    """Why a get gave nothing that can be used."""

    ABSENT = "absent"
    SHORT = "short"  # the object has another length than was asked for
    CORRUPT = "corrupt"  # its checksum is wrong, or its header cannot be read
    MISMATCH = (
        "mismatch"  # it is whole, but the content of another key, namespace, format or layout
    )
    LATE = "late"  # no answer before the deadline
    UNAVAILABLE = "unavailable"  # the medium failed, or is switched off after failing


@dataclass(frozen=True, slots=True)
class Got:
    """All buffers are filled. `labels` are those of the object, b"" where it has none."""

    num_bytes: int
    labels: bytes = b""


@dataclass(frozen=True, slots=True)
class Miss:
    """Nothing was got; the buffers may hold anything. `reason` is for people."""

    cause: MissCause
    reason: str = ""


class PutOutcome(StrEnum):
    """What became of a put; every outcome leaves the tier usable."""

    STORED = "stored"
    PRESENT = "present"  # it is there already, or somebody is writing it
    REFUSED = "refused"  # too large, or no room that may be taken
    FAILED = "failed"  # the medium failed; nothing of it is visible


class Occasion(StrEnum):
    """When a block may be written to a tier."""

    FINISHED = "finished"  # the request that computed it has ended
    REUSED = "reused"  # a second request used it
    IDLE = "idle"  # nobody used it for `idle_s`
    EVICTED = "evicted"  # the place above needs its room
    CLOSING = "closing"  # the process ends in good order


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a medium can do.

    `is_local`: `find` answers from memory, without waiting for a medium. `is_persistent`: objects outlive the
    process. `is_shared`: other machines see them. `keeps_labels`: labels that a put brings come back, with a
    get, `labels` and `labelled`. `relabels`: where they are kept, `relabel` replaces them.
    """

    is_local: bool
    is_persistent: bool
    is_shared: bool
    keeps_labels: bool
    relabels: bool = True


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as iteration shows it."""

    key: StoredKey
    num_bytes: int


class Labelled(NamedTuple):
    """An object and its labels, b"" where it has none.

    A NamedTuple because a start makes one for each object, and a frozen dataclass takes far longer.
    """

    key: StoredKey
    num_bytes: int
    labels: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStats:
    """What a tier holds and what it did. `capacity_bytes` is None where somebody else bounds it.

    `in_use_bytes` are being read or written, or are held; `reusable_bytes` wait for a reader; `free_bytes` is
    None without a capacity. `misses` counts by MissCause, `puts` by PutOutcome.
    """

    name: str
    capacity_bytes: int | None
    in_use_bytes: int
    reusable_bytes: int
    free_bytes: int | None
    num_objects: int
    num_evictions: int
    misses: dict[str, int]
    puts: dict[str, int]


class Tier(ABC):
    """One medium. No method raises for a fault of the medium: get misses, put fails, find says absent.

    Constructors raise ConfigError for settings that cannot be, before anything is written.
    """

    name: str
    capabilities: Capabilities

    @property
    @abstractmethod
    def capacity_bytes(self) -> int | None:
        """The most it may hold, or None where somebody else bounds it."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of all objects, those being written included; never more than the capacity."""

    @abstractmethod
    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        """What is known of each key, in one round trip for all. Changes nothing."""

    @abstractmethod
    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        """Fill `buffers`, writable and contiguous, in order with the object's bytes.

        An object that is not exactly as long as all of them together is a miss (SHORT), found out before
        memory is taken. Counts as a use for the tier's eviction.
        """

    @abstractmethod
    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        """Keep `parts`, together `num_bytes`, under `key`; evicts what its policy lets go for it.

        Until all parts are written the key is IN_FLIGHT and cannot be got; when `parts` ends early or raises,
        nothing of it stays, and what it raised is passed on. The object and its labels appear together, where
        they are kept; what is PRESENT keeps the labels that it has.
        """

    @abstractmethod
    def delete(self, keys: Sequence[StoredKey]) -> int:
        """Forget objects, also ones being written; returns how many there were.

        Who is reading one reads it to its end.
        """

    @property
    def num_unreached(self) -> int:
        """How many deletes and listings so far did not reach all that they meant.

        Where it is the same before and after one of them, that one reached it all.
        """
        return 0

    @abstractmethod
    def objects(self) -> Iterator[StoredObject]:
        """All complete objects, in no order; others may come and go meanwhile."""

    @abstractmethod
    def stats(self) -> TierStats:
        """Counters since the start, and what is held now."""

    def touch(self, keys: Sequence[StoredKey]) -> None:  # noqa: B027 - most keep no order
        """Say that these were used elsewhere; where an eviction order is kept, it counts as a use."""

    def labels(self, key: StoredKey) -> bytes | None:
        """The labels of an object, b"" where it has none; None without the object, or where none are kept."""
        return None

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        """Replace an object's labels, which survive what the object survives; whether that was done.

        Nothing comes into being for a key that is gone.
        """
        return False

    def revise_labels(self, keys: Sequence[StoredKey], change: LabelChange) -> list[bool]:
        """Replace labels by what `change` makes of them; for each object whether that was done.

        In two round trips for all where there are any. Where other machines write as well, `change` is asked
        again with what they have written meanwhile. Not done where there is no such object.
        """

        def revise(key: StoredKey) -> bool:
            old = self.labels(key)
            if old is None:
                return False
            new = change(key, old)
            return new is None or self.relabel(key, new)

        return [revise(key) for key in keys]

    def labelled(self) -> Iterator[Labelled]:
        """All complete objects with their labels, as `objects`; complete enough to purge by.

        From memory where the tier is local, once it has looked at its medium; else in batches.
        """
        for item in self.objects():
            yield Labelled(item.key, item.num_bytes, self.labels(item.key) or b"")

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        """Never evict these until `let_go`; for each, whether it is held now.

        Only what is complete can be held; to hold it twice is to hold it once. A delete removes it all the
        same. Holds end with the process, and with the object.
        """
        return [False] * len(keys)

    def let_go(self, keys: Sequence[StoredKey]) -> None:  # noqa: B027 - most hold nothing
        """Let these be evicted again, as used now."""

    def rank_by(self, rank_of: RankOf) -> None:  # noqa: B027 - most evict nothing
        """Evict objects of a lower rank first, those that are there already included."""

    def close(self) -> None:  # noqa: B027 - some have nothing to give back
        """Give back files, memory and connections; calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
