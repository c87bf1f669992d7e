"""From an object of a tier to a verified block: nothing is used that is not what it claims to be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Miss, MissCause, Tier
from kvkeep.tiers.stored_form import (
    StoredHeader,
    checksum,
    encode_header,
    header_bytes,
    parse_header,
    why_not,
)

__all__ = ["QuarantiningTier", "Verified", "put_aside", "read_block", "stored_parts"]


@runtime_checkable
class QuarantiningTier(Protocol):
    """A tier that puts wrong objects aside, for people to look at, instead of forgetting them."""

    def quarantine(self, key: StoredKey, reason: str) -> None:
        """Take the object out of use."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The payload is in its buffer, whole and the right one, in this layout; with the object's labels."""

    layout: str
    num_bytes: int
    labels: bytes = b""


def stored_parts(
    header: StoredHeader, block_size: int, payload: memoryview
) -> Callable[[], list[memoryview]]:
    """The parts of the object that `payload` makes, for TierStack.put."""
    assert payload.nbytes == header.payload_bytes
    page = encode_header(header, block_size)
    return lambda: [memoryview(page), payload]


def read_block(
    tier: Tier, key: StoredKey, wanted: StoredHeader, block_size: int, payload: memoryview
) -> Verified | Miss:
    """Get the object `key` and its payload into `payload`, of the wanted length.

    `wanted` is compared field by field, its checksum and layout aside; the checksum is computed. What is not
    the block it should be is taken out of the tier, so that nobody meets it twice.
    """
    page = bytearray(header_bytes(block_size))
    got = tier.get(key, [memoryview(page), payload])
    if isinstance(got, Miss):
        if got.cause in (MissCause.SHORT, MissCause.CORRUPT):
            put_aside(tier, key, got)
        return got
    problem = _problem(page, wanted, payload)
    if isinstance(problem, Miss):
        put_aside(tier, key, problem)
        return problem
    return Verified(problem.layout, got.num_bytes, got.labels)


def _problem(page: bytearray, wanted: StoredHeader, payload: memoryview) -> StoredHeader | Miss:
    found = parse_header(memoryview(page))
    if isinstance(found, Miss):
        return found
    miss = why_not(found, wanted)
    if miss is not None:
        return miss
    if checksum([payload]) != found.checksum:
        return Miss(MissCause.CORRUPT, "payload checksum")
    return found


def put_aside(tier: Tier, key: StoredKey, miss: Miss) -> None:
    """Take a wrong object out of its tier: into quarantine where there is one."""
    if isinstance(tier, QuarantiningTier):
        tier.quarantine(key, f"{miss.cause}: {miss.reason}")
    else:
        tier.delete([key])
