"""One block as one object, the same in every tier: header page, then payload. Exact bytes: docs/formats.md.

    0       8 bytes   magic "KVKEEPB1"
    8       4 bytes   length of the msgpack map, little-endian
    12      4 bytes   pages before the payload, little-endian
    16      8 bytes   xxh3-64 of the map
    24      ...       msgpack map: see StoredHeader; zeros up to a multiple of 4096
    ...     payload   as it lies in an arena, in the layout the header names

Never pickle: what comes from a store is checked field by field, and lengths before memory is taken.
"""

from collections.abc import Sequence

import msgspec
import xxhash

from kvkeep.tiers.base import Miss, MissCause

__all__ = [
    "HEADER_PAGE",
    "StoredHeader",
    "checksum",
    "encode_header",
    "header_bytes",
    "parse_header",
    "payload_start",
    "why_not",
]

HEADER_PAGE = 4096
_MAGIC = b"KVKEEPB1"
_PREFIX_BYTES = 24
_TOKEN_BYTES = 4
# The map without tokens: keys of fields, three digests and names that are at most this long together.
_FIXED_BYTES = 1024


class StoredHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an object says of itself.

    `key` names the content, `parent` what it continues, `namespace` (the chain's root) who may share it;
    `tokens` are the block's own in canonical bytes. `group` and `group_name` say which layers, `kv_format`
    and `layout` what the payload's bytes mean, `checksum` is its xxh3-128.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    tokens: bytes
    group: int
    group_name: str
    kv_format: str
    layout: str
    payload_bytes: int
    checksum: bytes


def header_bytes(block_size: int) -> int:
    """Bytes before the payload, the same for all blocks of so many tokens."""
    needed = _PREFIX_BYTES + _FIXED_BYTES + _TOKEN_BYTES * block_size
    return -(-needed // HEADER_PAGE) * HEADER_PAGE


def payload_start(content: bytes | memoryview) -> int:
    """Where an object says that its payload begins."""
    return int.from_bytes(content[12:16], "little") * HEADER_PAGE


def encode_header(header: StoredHeader, block_size: int) -> bytes:
    """The bytes before the payload."""
    body = msgspec.msgpack.encode(header)
    size = header_bytes(block_size)
    assert len(body) <= size - _PREFIX_BYTES, "names in a header are short"
    lengths = len(body).to_bytes(4, "little") + (size // HEADER_PAGE).to_bytes(4, "little")
    prefix = _MAGIC + lengths + xxhash.xxh3_64_digest(body)
    return (prefix + body).ljust(size, b"\0")


def parse_header(page: bytes | memoryview) -> StoredHeader | Miss:
    """The header that a page of bytes from a store holds, or what is wrong with it."""
    prefix = bytes(page[:_PREFIX_BYTES])
    if prefix[:8] != _MAGIC:
        return Miss(MissCause.CORRUPT, f"magic is {prefix[:8]!r}")
    length = int.from_bytes(prefix[8:12], "little")
    if payload_start(page) != len(page) or length > len(page) - _PREFIX_BYTES:
        return Miss(MissCause.CORRUPT, f"header of {length} bytes in pages of {len(page)}")
    body = bytes(page[_PREFIX_BYTES : _PREFIX_BYTES + length])
    if any(page[_PREFIX_BYTES + length :]):
        return Miss(MissCause.CORRUPT, "bytes behind the header are not zero")
    if xxhash.xxh3_64_digest(body) != prefix[16:]:
        return Miss(MissCause.CORRUPT, "header checksum")
    try:
        return msgspec.msgpack.decode(body, type=StoredHeader)
    except msgspec.DecodeError as error:
        return Miss(MissCause.CORRUPT, f"header: {error}")


def checksum(parts: Sequence[memoryview]) -> bytes:
    """xxh3-128 of the parts, one after another."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def why_not(found: StoredHeader, wanted: StoredHeader) -> Miss | None:
    """Why an object is not the one that is wanted, its checksum and layout aside; None if it is."""
    for field in (
        "namespace", "key", "parent", "tokens", "group", "group_name", "kv_format", "payload_bytes"
    ):  # fmt: skip
        value = getattr(found, field)
        if value != getattr(wanted, field):
            return Miss(MissCause.MISMATCH, f"{field} is {_short(value)}")
    return None


def _short(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)[:60]
