"""A tier without bytes, for replaying traces: what it would hold, in which order it would go."""

from collections.abc import Iterable, Iterator, Sequence
from threading import Lock

import numpy as np

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
from kvkeep.tiers.catalog import Catalog
from kvkeep.tiers.tally import Tally

__all__ = ["PhantomTier", "phantom_bytes"]


def phantom_bytes(num_bytes: int) -> memoryview:
    """A view as long as `num_bytes` that takes no memory: every byte is the same zero; read-only."""
    return np.broadcast_to(np.uint8(0), (num_bytes,)).data


class PhantomTier(Tier):
    """Keys, sizes and an eviction order. `put` reads no parts, and `get` leaves the buffers as they are.

    `policy` is a name or a policy of its own. What is evicted is shown to `on_evict` as bytes of the right
    length that mean nothing, with its labels, before its place is reused. Raises ConfigError for a capacity
    below one byte.
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
        self.on_evict: Spill | None = None
        if isinstance(policy, str):
            policy = make_policy(policy, by_content=True)
        self._catalog = Catalog(capacity_bytes, policy)
        self._lock = Lock()
        self._tally = Tally()
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
            return self._tally.miss(MissCause.SHORT, f"{num_bytes} bytes, {wanted} were asked for")
        if num_bytes is None or self._catalog.acquire(key) is None:
            return self._tally.miss(MissCause.ABSENT)
        self._catalog.release(key)
        with self._lock:
            self._got_bytes += num_bytes
        return Got(num_bytes, self._catalog.labels(key) or b"")

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        admission = self._catalog.begin(key, num_bytes, labels)
        if admission is None:
            is_absent = self._catalog.find([key]) == [Presence.ABSENT]
            return self._tally.put(PutOutcome.REFUSED if is_absent else PutOutcome.PRESENT)
        if self.on_evict is not None:
            for victim in admission.evicted:
                self.on_evict(victim.key, (self._bytes(victim.num_bytes),), victim.labels)
        self._catalog.commit(key)
        with self._lock:
            self._put_bytes += num_bytes
        return self._tally.put(PutOutcome.STORED)

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

    def labelled(self) -> Iterator[Labelled]:
        return iter(self._catalog.labelled())

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        return self._catalog.hold(keys)

    def let_go(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.let_go(keys)

    def rank_by(self, rank_of: RankOf) -> None:
        self._catalog.rank_by(rank_of)

    def stats(self) -> TierStats:
        return self._tally.stats(self.name, self._catalog)

    def _bytes(self, num_bytes: int) -> memoryview:
        stand_in = self._stand_in
        if stand_in.nbytes != num_bytes:
            stand_in = self._stand_in = phantom_bytes(num_bytes)
        return stand_in
