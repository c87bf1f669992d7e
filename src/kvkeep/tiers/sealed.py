"""Encryption at rest: a wrapper that seals every object with AES-256-GCM under the key of its tenant.

The form of what is kept is in `aead`; keys are kept by a `Keyring`.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from kvkeep.errors import ConfigError, TierError
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Got,
    LabelChange,
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    RankOf,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.keyring import Keyring, TenantKey
from kvkeep.tiers.stored_form import HEADER_PAGE
from kvkeep.tiers.wrapper import TierWrapper

if TYPE_CHECKING:
    from kvkeep.tiers.aead import Aead

__all__ = ["SEAL_BYTES", "Sealed"]

# Bytes of every object beyond its own.
SEAL_BYTES = HEADER_PAGE


class Sealed(TierWrapper):
    """What the tier inside keeps is unreadable, and cannot be changed unnoticed, without the tenant's key.

    `tenant_of` tells whose an object is; any thread may call it. Objects of a tenant without key are absent,
    and `sweep` takes their bytes back; so are those of a key that was erased before the tenant got another.
    Labels are sealed like objects. Only ciphertext is held beside the caller's own buffers.

    Raises ConfigError where the library for it is not installed.
    """

    def __init__(self, tier: Tier, keyring: Keyring, tenant_of: Callable[[StoredKey], str]) -> None:
        super().__init__(tier)
        self._keyring = keyring
        self._tenant_of = tenant_of
        self._aead = _load_aead()
        self._scratch = _Scratch()
        self._lock = Lock()
        self._misses: Counter[str] = Counter()
        self._num_failed = 0

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        tenant_to_has_key: dict[str, bool] = {}
        tenants = [self._tenant_of(key) for key in keys]
        for tenant in tenants:
            if tenant not in tenant_to_has_key:
                tenant_to_has_key[tenant] = isinstance(self._key_of(tenant), TenantKey)
        asked = [k for k, tenant in zip(keys, tenants, strict=True) if tenant_to_has_key[tenant]]
        found = iter(self.inner.find(asked) if asked else [])
        return [next(found) if tenant_to_has_key[tenant] else Presence.ABSENT for tenant in tenants]

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        tenant_key = self._key_of(self._tenant_of(key))
        if isinstance(tenant_key, Miss):
            return self._count(tenant_key)
        num_bytes = sum(buffer.nbytes for buffer in buffers)
        with self._scratch.lend(SEAL_BYTES + num_bytes) as sealed:
            got = self.inner.get(key, [sealed])
            if isinstance(got, Miss):
                return got
            miss = self._aead.open(tenant_key, key, sealed, buffers)
        if miss is None:
            labels = self._open_labels(tenant_key, key, got.labels)
            if labels is not None:
                return Got(num_bytes, labels)
            # Nobody can tell whether it may still be used.
            miss = Miss(MissCause.CORRUPT, "sealed labels")
        if miss.cause is MissCause.ABSENT:
            # Its key is gone, so it only stands in the way of what is put under the new one.
            self.inner.delete([key])
        return self._count(miss)

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        try:
            tenant_key = self._keyring.obtain(self._tenant_of(key))
        except TierError:
            with self._lock:
                self._num_failed += 1
            return PutOutcome.FAILED
        sealed = self._seal(tenant_key, key, parts, SEAL_BYTES + num_bytes)
        with closing(sealed):
            sealed_labels = self._seal_labels(tenant_key, key, labels)
            return self.inner.put(key, sealed, SEAL_BYTES + num_bytes, sealed_labels)

    def objects(self) -> Iterator[StoredObject]:
        for item in self.inner.objects():
            if item.num_bytes >= SEAL_BYTES and self._has_key(item.key):
                yield StoredObject(item.key, item.num_bytes - SEAL_BYTES)

    def sweep(self) -> int:
        """Delete all objects of tenants without key; returns how many there were."""
        erased = []
        for item in self.inner.objects():
            tenant_key = self._key_of(self._tenant_of(item.key))
            if isinstance(tenant_key, Miss) and tenant_key.cause is MissCause.ABSENT:
                erased.append(item.key)
        return self.inner.delete(erased)

    def labels(self, key: StoredKey) -> bytes | None:
        tenant_key = self._key_of(self._tenant_of(key))
        if isinstance(tenant_key, Miss):
            return None
        sealed = self.inner.labels(key)
        return None if sealed is None else self._open_labels(tenant_key, key, sealed)

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        tenant_key = self._key_of(self._tenant_of(key))
        if isinstance(tenant_key, Miss):
            return False
        return self.inner.relabel(key, self._seal_labels(tenant_key, key, labels))

    def revise_labels(self, keys: Sequence[StoredKey], change: LabelChange) -> list[bool]:
        keyed = {key: self._key_of(self._tenant_of(key)) for key in keys}

        def revise(key: StoredKey, sealed: bytes) -> bytes | None:
            tenant_key = keyed[key]
            assert isinstance(tenant_key, TenantKey)
            # What cannot be opened is given by no get, and is replaced.
            new = change(key, self._open_labels(tenant_key, key, sealed) or b"")
            return None if new is None else self._seal_labels(tenant_key, key, new)

        there = [key for key, tenant_key in keyed.items() if isinstance(tenant_key, TenantKey)]
        are_done = dict(zip(there, self.inner.revise_labels(there, revise), strict=True))
        return [are_done.get(key, False) for key in keys]

    def rank_by(self, rank_of: RankOf) -> None:
        def rank_of_sealed(key: StoredKey, sealed: bytes) -> int:
            tenant_key = self._key_of(self._tenant_of(key))
            if isinstance(tenant_key, Miss):
                return rank_of(key, b"")
            return rank_of(key, self._open_labels(tenant_key, key, sealed) or b"")

        self.inner.rank_by(rank_of_sealed)

    def labelled(self) -> Iterator[Labelled]:
        """As `objects`, without those whose labels cannot be opened: no get gives them either."""
        for item in self.inner.labelled():
            tenant_key = self._key_of(self._tenant_of(item.key))
            if item.num_bytes < SEAL_BYTES or isinstance(tenant_key, Miss):
                continue
            labels = self._open_labels(tenant_key, item.key, item.labels)
            if labels is not None:
                yield Labelled(item.key, item.num_bytes - SEAL_BYTES, labels)

    def stats(self) -> TierStats:
        inner = self.inner.stats()
        with self._lock:
            misses = Counter(inner.misses) + self._misses
            puts = Counter(inner.puts) + Counter({str(PutOutcome.FAILED): self._num_failed})
        return replace(inner, misses=dict(misses), puts=dict(puts))

    def _spill(self, key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
        """Pass on what is evicted opened: whoever takes it seals it himself."""
        if self.on_evict is None:
            return
        tenant_key = self._key_of(self._tenant_of(key))
        sealed = memoryview(b"".join(parts))
        if isinstance(tenant_key, Miss) or sealed.nbytes < SEAL_BYTES:
            return
        opened = [memoryview(bytearray(sealed.nbytes - SEAL_BYTES))]
        opened_labels = self._open_labels(tenant_key, key, labels)
        if opened_labels is not None and not self._aead.open(tenant_key, key, sealed, opened):
            self.on_evict(key, opened, opened_labels)

    def _seal(
        self, tenant_key: TenantKey, key: StoredKey, parts: Iterable[memoryview], num_bytes: int
    ) -> Generator[memoryview, None, None]:
        # Memory is taken when the tier asks for the first part: what it refuses costs none.
        with self._scratch.lend(num_bytes) as sealed:
            yield from self._aead.seal(tenant_key, key, parts, sealed)

    def _seal_labels(self, tenant_key: TenantKey, key: StoredKey, labels: bytes) -> bytes:
        """None are none, sealed or not."""
        return self._aead.seal_labels(tenant_key, key, labels) if labels else b""

    def _open_labels(self, tenant_key: TenantKey, key: StoredKey, sealed: bytes) -> bytes | None:
        return self._aead.open_labels(tenant_key, key, sealed) if sealed else b""

    def _key_of(self, tenant: str) -> TenantKey | Miss:
        try:
            key = self._keyring.find(tenant)
        except TierError as error:
            return Miss(MissCause.UNAVAILABLE, str(error))
        return Miss(MissCause.ABSENT, "erased") if key is None else key

    def _has_key(self, key: StoredKey) -> bool:
        return isinstance(self._key_of(self._tenant_of(key)), TenantKey)

    def _count(self, miss: Miss) -> Miss:
        with self._lock:
            self._misses[str(miss.cause)] += 1
        return miss


class _Scratch:
    """Memory for ciphertext, one piece for each call that runs at the same time, used again and again."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []

    @contextmanager
    def lend(self, num_bytes: int) -> Iterator[memoryview]:
        """Memory of `num_bytes` with anything in it; taken back at the end of the block."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = bytearray()
        if len(memory) < num_bytes:
            memory = bytearray(num_bytes)
        try:
            yield memoryview(memory)[:num_bytes]
        finally:
            self._free.append(memory)


def _load_aead() -> "Aead":
    try:
        from kvkeep.tiers.aead import Aead  # what it stands on is optional
    except ImportError as error:
        raise ConfigError(
            f"encryption needs a library that is absent ({error}); run pip install 'kvkeep[encryption]'"
        ) from error
    return Aead()
