"""What lies behind an object in a store: its labels, and a trailer that says how long both are.

    0               the object, from offset 0, so that its payload stays aligned
    num_bytes       zeros: room for other labels in the same place
    end - 24 - n    labels, n bytes
    end - 24        8 bytes  length of the object, little-endian
    end - 16        4 bytes  length of the labels
    end - 12        4 bytes  CRC-32 of the labels and the two lengths
    end - 8         8 bytes  magic "KVKEEPL1"

The same on disk, in RESP servers and in object stores. Read from its end it says what it is, so that the end
alone is read where the object is not wanted. The object's own bytes are checked by `stored_form`.
"""

import struct
import zlib
from dataclasses import dataclass

__all__ = [
    "TRAILER_BYTES",
    "Trailer",
    "encode_tail",
    "labels_at_end",
    "labels_behind",
    "labels_crc",
    "parse_trailer",
]

_TRAILER = struct.Struct("<QII8s")
_LENGTHS = struct.Struct("<QI")
_CRC_AND_MAGIC = struct.Struct("<I8s")
_MAGIC = b"KVKEEPL1"
TRAILER_BYTES = _TRAILER.size


@dataclass(frozen=True, slots=True)
class Trailer:
    """What the end of a stored object says of it; `crc` is not compared yet."""

    num_bytes: int
    num_label_bytes: int
    crc: int

    @property
    def tail_bytes(self) -> int:
        """What is behind the object at least."""
        return self.num_label_bytes + TRAILER_BYTES


def labels_crc(num_bytes: int, labels: bytes | memoryview) -> int:
    """What trailers, and the index of a disk, guard labels with."""
    return zlib.crc32(_LENGTHS.pack(num_bytes, len(labels)), zlib.crc32(labels))


def encode_tail(num_bytes: int, labels: bytes, *, least_bytes: int = 0) -> bytes:
    """All that follows an object of `num_bytes`; zeros make it `least_bytes` long."""
    # Labels and lengths lie together, so one pass guards both.
    guarded = labels + _LENGTHS.pack(num_bytes, len(labels))
    tail = guarded + _CRC_AND_MAGIC.pack(zlib.crc32(guarded), _MAGIC)
    return tail.rjust(least_bytes, b"\0") if len(tail) < least_bytes else tail


def parse_trailer(end: bytes | bytearray | memoryview) -> Trailer | None:
    """What the last bytes of a stored object say, None where they are no trailer."""
    if len(end) < TRAILER_BYTES:
        return None
    num_bytes, num_label_bytes, crc, magic = _TRAILER.unpack_from(end, len(end) - TRAILER_BYTES)
    return Trailer(num_bytes, num_label_bytes, crc) if magic == _MAGIC else None


def labels_at_end(end: bytes | bytearray | memoryview, trailer: Trailer) -> bytes | None:
    """The labels before a trailer, None where `end` has not all of them, or they are damaged."""
    begin = len(end) - trailer.tail_bytes
    if begin < 0:
        return None
    labels = bytes(end[begin : len(end) - TRAILER_BYTES])
    return labels if labels_crc(trailer.num_bytes, labels) == trailer.crc else None


def labels_behind(tail: bytes | bytearray | memoryview, num_bytes: int) -> bytes | None:
    """The labels in `tail`, which is all that follows an object of `num_bytes`; None where it is not."""
    end = len(tail) - TRAILER_BYTES
    if end < 0:
        return None
    found_bytes, num_label_bytes, crc, magic = _TRAILER.unpack_from(tail, end)
    if magic != _MAGIC or found_bytes != num_bytes or num_label_bytes > end:
        return None
    guarded = tail[end - num_label_bytes : end + _LENGTHS.size]
    return bytes(guarded[:num_label_bytes]) if zlib.crc32(guarded) == crc else None
