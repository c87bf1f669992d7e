"""Objects to test tiers with: what lies under a key follows from the key, so that any mix-up shows."""

import hashlib
from collections.abc import Iterable, Iterator
from threading import Event

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Miss, PutOutcome, Tier

__all__ = ["HeldParts", "content_of", "cut", "key_of", "read_object", "store_object"]

_WAIT_S = 30.0


def key_of(number: int) -> StoredKey:
    """The name of test object `number`: a digest and a byte of group number, as blocks have it."""
    return StoredKey(hashlib.sha256(number.to_bytes(8, "little")).digest() + b"\0")


def content_of(key: StoredKey, num_bytes: int) -> bytes:
    """The bytes that belong under `key`: others for every key, and for every length."""
    return hashlib.shake_128(key + num_bytes.to_bytes(8, "little")).digest(num_bytes)


def cut(content: bytes | bytearray, ends: Iterable[int]) -> list[memoryview]:
    """`content` in parts that end at `ends`, and the rest; equal ends make empty parts."""
    view, parts, begin = memoryview(content), [], 0
    for end in ends:
        parts.append(view[begin:end])
        begin = end
    return [*parts, view[begin:]]


def store_object(tier: Tier, key: StoredKey, num_bytes: int, labels: bytes = b"") -> PutOutcome:
    """Put what belongs under `key`."""
    return tier.put(key, [memoryview(content_of(key, num_bytes))], num_bytes, labels)


def read_object(tier: Tier, key: StoredKey, num_bytes: int) -> bytes | Miss:
    """Get an object of so many bytes in one buffer."""
    buffer = bytearray(num_bytes)
    got = tier.get(key, [memoryview(buffer)])
    if isinstance(got, Miss):
        return got
    assert got == Got(num_bytes, got.labels)
    return bytes(buffer)


class HeldParts:
    """Parts of an object that stop after the first one until `release`.

    `is_begun` is set when the first one was taken and the next one was asked for.
    """

    def __init__(self, content: bytes) -> None:
        self.is_begun = Event()
        self._is_released = Event()
        self._content = content

    def __iter__(self) -> Iterator[memoryview]:
        first, rest = cut(self._content, [len(self._content) // 2])
        yield first
        self.is_begun.set()
        assert self._is_released.wait(_WAIT_S), "nobody released the parts"
        yield rest

    def release(self) -> None:
        """Let the rest out."""
        self._is_released.set()
