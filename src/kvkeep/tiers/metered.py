"""How long a tier takes, and what comes of it: a wrapper that counts calls, bytes, seconds and outcomes."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from threading import Lock
from time import perf_counter

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, LabelChange, Miss, Presence, PutOutcome, Tier
from kvkeep.tiers.wrapper import TierWrapper

__all__ = ["LATENCY_BOUNDS_S", "Meter", "Metered", "Operation", "OperationMeter"]

# Upper bounds of the buckets of every latency histogram: 1 us to 67 s, each twice the one before. One more
# bucket takes what is longer.
LATENCY_BOUNDS_S = tuple(1e-6 * 2.0**power for power in range(27))


class Operation(StrEnum):
    """What is measured of a tier."""

    FIND = "find"
    GET = "get"
    PUT = "put"
    DELETE = "delete"
    RELABEL = "relabel"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, kw_only=True, slots=True)
class OperationMeter:
    """One operation since the start, finished calls only.

    `num_bytes` came whole (get) or are kept now (put). `histogram` counts calls by LATENCY_BOUNDS_S, in its
    last entry those above all bounds. `outcomes` counts objects: finds by Presence, gets by "got" or
    MissCause, puts by PutOutcome, deletes by "deleted" and "absent", relabels by "done" and "absent"; a call
    that passed an exception on counts as "raised".
    """

    num_calls: int
    num_bytes: int
    total_s: float
    histogram: tuple[int, ...]
    outcomes: Mapping[str, int]

    @property
    def mean_s(self) -> float | None:
        """Seconds of a call on average, None before the first."""
        return self.total_s / self.num_calls if self.num_calls else None

    def quantile_s(self, share: float) -> float | None:
        """An upper bound, within a factor of two, of the seconds that `share` of the calls took.

        None before the first call, infinite above the last bound.
        """
        assert 0 <= share <= 1
        if not self.num_calls:
            return None
        num_below = 0
        for num_calls, bound_s in zip(self.histogram, LATENCY_BOUNDS_S, strict=False):
            num_below += num_calls
            if num_below >= max(share * self.num_calls, 1):
                return bound_s
        return inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """A snapshot of what a tier did since it was wrapped."""

    name: str
    operations: Mapping[Operation, OperationMeter]


@dataclass(slots=True)
class _Account:
    num_calls: int = 0
    num_bytes: int = 0
    total_s: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    outcomes: Counter[str] = field(default_factory=Counter)

    def snapshot(self) -> OperationMeter:
        return OperationMeter(
            num_calls=self.num_calls,
            num_bytes=self.num_bytes,
            total_s=self.total_s,
            histogram=tuple(self.histogram),
            outcomes=dict(self.outcomes),
        )


class Metered(TierWrapper):
    """Counts what passes; `clock` gives seconds. A put's time includes the making of its parts."""

    def __init__(self, tier: Tier, *, clock: Callable[[], float] = perf_counter) -> None:
        super().__init__(tier)
        self._clock = clock
        self._lock = Lock()
        self._accounts = {operation: _Account() for operation in Operation}

    @property
    def meter(self) -> Meter:
        """All counters as of now, consistent with each other."""
        with self._lock:
            operations = {of: account.snapshot() for of, account in self._accounts.items()}
        return Meter(name=self.name, operations=operations)

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        start = self._clock()
        presences = self.inner.find(keys)
        self._enter(Operation.FIND, start, Counter[str](presences))
        return presences

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        start = self._clock()
        result = self.inner.get(key, buffers)
        if isinstance(result, Got):
            self._enter(Operation.GET, start, {"got": 1}, result.num_bytes)
        else:
            self._enter(Operation.GET, start, {result.cause: 1})
        return result

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        start = self._clock()
        try:
            outcome = self.inner.put(key, parts, num_bytes, labels)
        except BaseException:
            self._enter(Operation.PUT, start, {"raised": 1})
            raise
        num_kept = num_bytes if outcome is PutOutcome.STORED else 0
        self._enter(Operation.PUT, start, {outcome: 1}, num_kept)
        return outcome

    def delete(self, keys: Sequence[StoredKey]) -> int:
        start = self._clock()
        num_deleted = self.inner.delete(keys)
        outcomes = {"deleted": num_deleted, "absent": len(keys) - num_deleted}
        self._enter(Operation.DELETE, start, outcomes)
        return num_deleted

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        start = self._clock()
        is_done = self.inner.relabel(key, labels)
        self._enter(Operation.RELABEL, start, {"done" if is_done else "absent": 1})
        return is_done

    def revise_labels(self, keys: Sequence[StoredKey], change: LabelChange) -> list[bool]:
        start = self._clock()
        are_done = self.inner.revise_labels(keys, change)
        outcomes = {"done": sum(are_done), "absent": len(are_done) - sum(are_done)}
        self._enter(Operation.RELABEL, start, outcomes)
        return are_done

    def quarantine(self, key: StoredKey, reason: str) -> None:
        start = self._clock()
        super().quarantine(key, reason)
        self._enter(Operation.QUARANTINE, start, {"done": 1})

    def _enter(
        self,
        operation: Operation,
        start: float,
        outcomes: Mapping[str, int],
        num_bytes: int = 0,
    ) -> None:
        seconds = self._clock() - start
        with self._lock:
            account = self._accounts[operation]
            account.num_calls += 1
            account.num_bytes += num_bytes
            account.total_s += seconds
            account.histogram[bisect_left(LATENCY_BOUNDS_S, seconds)] += 1
            for outcome, count in outcomes.items():
                # As plain text, so that a snapshot reads and serialises the same for every operation.
                account.outcomes[str(outcome)] += count
