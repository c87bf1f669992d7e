"""A tier around a tier, which passes everything on: a wrapper says only what it changes."""

from collections.abc import Iterable, Iterator, Sequence

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Got,
    Labelled,
    Miss,
    Presence,
    PutOutcome,
    RankOf,
    Spill,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.reading import QuarantiningTier
from kvkeep.tiers.stack import SpillingTier

__all__ = ["TierWrapper"]


class TierWrapper(Tier):
    """Has the name, the capabilities and the optional methods of the tier inside, and closes it.

    `on_evict` is there if the tier inside shows what it evicts; from then on, set it here and not inside.
    """

    on_evict: Spill | None

    def __init__(self, tier: Tier) -> None:
        self.inner = tier
        self.name = tier.name
        self.capabilities = tier.capabilities
        if isinstance(tier, SpillingTier):
            self.on_evict = tier.on_evict
            tier.on_evict = self._spill

    @property
    def capacity_bytes(self) -> int | None:
        return self.inner.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self.inner.used_bytes

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        return self.inner.find(keys)

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        return self.inner.get(key, buffers)

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        return self.inner.put(key, parts, num_bytes, labels)

    def delete(self, keys: Sequence[StoredKey]) -> int:
        return self.inner.delete(keys)

    @property
    def num_unreached(self) -> int:
        return self.inner.num_unreached

    def quarantine(self, key: StoredKey, reason: str) -> None:
        """Take a wrong object out of use: put aside where the tier inside can, else forgotten."""
        if isinstance(self.inner, QuarantiningTier):
            self.inner.quarantine(key, reason)
        else:
            self.inner.delete([key])

    def objects(self) -> Iterator[StoredObject]:
        return self.inner.objects()

    def stats(self) -> TierStats:
        return self.inner.stats()

    def touch(self, keys: Sequence[StoredKey]) -> None:
        self.inner.touch(keys)

    def labels(self, key: StoredKey) -> bytes | None:
        return self.inner.labels(key)

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        return self.inner.relabel(key, labels)

    def labelled(self) -> Iterator[Labelled]:
        return self.inner.labelled()

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        return self.inner.hold(keys)

    def let_go(self, keys: Sequence[StoredKey]) -> None:
        self.inner.let_go(keys)

    def rank_by(self, rank_of: RankOf) -> None:
        self.inner.rank_by(rank_of)

    def close(self) -> None:
        self.inner.close()

    def _spill(self, key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
        """Pass on what the tier inside evicts."""
        if self.on_evict is not None:
            self.on_evict(key, parts, labels)
