"""A tier without bytes, for replaying traces: what it would hold, in which order it would go."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Lock

import numpy as np

from kvkeep.errors import ConfigError
from kvkeep.policies import EvictionPolicy, make_policy
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.catalog import Catalog

__all__ = ["PhantomTier", "phantom_bytes"]


def phantom_bytes(num_bytes: int) -> memoryview:
    """A view as long as `num_bytes` that takes no memory: every byte is the same zero; read-only."""
    return np.broadcast_to(np.uint8(0), (num_bytes,)).data


class PhantomTier(Tier):
    """Keys, sizes and an eviction order. `put` reads no parts, and `get` leaves the buffers as they are.

    `policy` is a name or a policy of its own. What is evicted is shown to `on_evict` as bytes of the right
    length that mean nothing, before its place is reused. Raises ConfigError for a capacity below one byte.
    """

    capabilities = Capabilities(
        is_local=True, is_persistent=False, is_shared=False, keeps_labels=True
    )

    def __init__(
        self,
        capacity_bytes: int,
        *,
        policy: str | EvictionPolicy[StoredKey] = "lru",
        name: str = "phantom",
    ) -> None:
        if capacity_bytes < 1:
            raise ConfigError(
                f"capacity_bytes={capacity_bytes!r} is not positive; give at least one block's bytes"
            )
        self.name = name
        self.on_evict: Callable[[StoredKey, Sequence[memoryview]], None] | None = None
        if isinstance(policy, str):
            policy = make_policy(policy, by_content=True)
        self._catalog = Catalog(capacity_bytes, policy)
        self._lock = Lock()
        self._cause_to_misses = dict.fromkeys(MissCause, 0)
        self._outcome_to_puts = dict.fromkeys(PutOutcome, 0)
        self._put_bytes = 0
        self._got_bytes = 0
        # Of the last victim; nearly all objects are of one size.
        self._stand_in = phantom_bytes(0)

    @property
    def capacity_bytes(self) -> int:
        return self._catalog.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._catalog.used_bytes

    @property
    def put_bytes(self) -> int:
        """Bytes of all objects that were stored here."""
        return self._put_bytes

    @property
    def got_bytes(self) -> int:
        """Bytes of all objects that were got."""
        return self._got_bytes

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        return self._catalog.find(keys)

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        num_bytes = self._catalog.num_bytes(key)
        wanted = sum(buffer.nbytes for buffer in buffers)
        if num_bytes is not None and num_bytes != wanted:
            return self._miss(MissCause.SHORT, f"{num_bytes} bytes, {wanted} were asked for")
        if num_bytes is None or self._catalog.acquire(key) is None:
            return self._miss(MissCause.ABSENT)
        self._catalog.release(key)
        with self._lock:
            self._got_bytes += num_bytes
        return Got(num_bytes)

    def put(self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int) -> PutOutcome:
        admission = self._catalog.begin(key, num_bytes)
        if admission is None:
            is_absent = self._catalog.find([key]) == [Presence.ABSENT]
            return self._count(PutOutcome.REFUSED if is_absent else PutOutcome.PRESENT)
        if self.on_evict is not None:
            for victim in admission.evicted:
                self.on_evict(victim.key, (self._bytes(victim.num_bytes),))
        self._catalog.commit(key)
        return self._count(PutOutcome.STORED, num_bytes)

    def delete(self, keys: Sequence[StoredKey]) -> int:
        return self._catalog.delete(keys)

    def objects(self) -> Iterator[StoredObject]:
        return iter(self._catalog.objects())

    def touch(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.touch(keys)

    def labels(self, key: StoredKey) -> bytes | None:
        return self._catalog.labels(key)

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        return self._catalog.relabel(key, labels)

    def stats(self) -> TierStats:
        catalog = self._catalog
        used, in_use = catalog.used_bytes, catalog.in_use_bytes
        return TierStats(
            name=self.name,
            capacity_bytes=catalog.capacity_bytes,
            in_use_bytes=in_use,
            reusable_bytes=used - in_use,
            free_bytes=catalog.capacity_bytes - used,
            num_objects=len(catalog),
            num_evictions=catalog.num_evictions,
            misses={str(cause): count for cause, count in self._cause_to_misses.items() if count},
            puts={str(what): count for what, count in self._outcome_to_puts.items() if count},
        )

    def _miss(self, cause: MissCause, reason: str = "") -> Miss:
        with self._lock:
            self._cause_to_misses[cause] += 1
        return Miss(cause, reason)

    def _count(self, outcome: PutOutcome, stored_bytes: int = 0) -> PutOutcome:
        # A replay makes millions of puts: one lock for both, and no look at names.
        with self._lock:
            self._outcome_to_puts[outcome] += 1
            self._put_bytes += stored_bytes
        return outcome

    def _bytes(self, num_bytes: int) -> memoryview:
        stand_in = self._stand_in
        if stand_in.nbytes != num_bytes:
            stand_in = self._stand_in = phantom_bytes(num_bytes)
        return stand_in
