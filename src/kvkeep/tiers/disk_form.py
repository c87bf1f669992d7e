"""An object as a file: its bytes, its labels, and a trailer that says how long both are.

    0               the object, from offset 0, so that its payload stays aligned
    num_bytes       labels
    end - 24        8 bytes  length of the object, little-endian
    end - 16        4 bytes  length of the labels
    end - 12        4 bytes  CRC-32 of the labels and the two lengths
    end - 8         8 bytes  magic "KVKEEPL1"

So a folder of files says all that an index of it says. The object's own bytes are checked by `stored_form`.
"""

import os
import struct
import zlib
from dataclasses import dataclass

from kvkeep.spec import StoredKey

__all__ = [
    "FileForm",
    "encode_trailer",
    "file_bytes",
    "is_name",
    "key_of_name",
    "labels_crc",
    "name_of_key",
    "read_form",
    "taken_bytes",
    "whole_blocks",
]

_TRAILER = struct.Struct("<QII8s")
_LENGTHS = struct.Struct("<QI")
_MAGIC = b"KVKEEPL1"
_DISK_BLOCK_BYTES = 4096
_MOST_NAME_CHARACTERS = 254


@dataclass(frozen=True, slots=True)
class FileForm:
    """What a file says of itself; `stamp` is its time of modification in nanoseconds, which no two share."""

    num_bytes: int
    labels: bytes
    stamp: int


def is_name(key: bytes) -> bool:
    """Whether a file can be named after a key."""
    return 0 < 2 * len(key) <= _MOST_NAME_CHARACTERS


def name_of_key(key: StoredKey) -> str:
    """The file name of an object."""
    assert is_name(key)
    return key.hex()


def key_of_name(name: str) -> StoredKey | None:
    """The key that a file name stands for; None for the name of something else."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return StoredKey(key) if key and key.hex() == name else None


def file_bytes(num_bytes: int, num_label_bytes: int) -> int:
    """The length of an object's file."""
    return num_bytes + num_label_bytes + _TRAILER.size


def taken_bytes(num_bytes: int, num_label_bytes: int) -> int:
    """What an object's file takes of a disk."""
    return whole_blocks(file_bytes(num_bytes, num_label_bytes))


def whole_blocks(length: int) -> int:
    """What a file of a length takes of a disk, which has blocks of 4096 bytes."""
    return -(-length // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES


def labels_crc(num_bytes: int, labels: bytes) -> int:
    """What the index and the trailer guard labels with."""
    return zlib.crc32(_LENGTHS.pack(num_bytes, len(labels)), zlib.crc32(labels))


def encode_trailer(num_bytes: int, labels: bytes) -> bytes:
    """What follows the object in its file, labels included."""
    crc = labels_crc(num_bytes, labels)
    return labels + _TRAILER.pack(num_bytes, len(labels), crc, _MAGIC)


def read_form(path: str) -> FileForm | None:
    """What the file says of itself, None where it is not whole. Raises OSError, also where there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        begin = status.st_size - _TRAILER.size
        if begin < 0:
            return None
        end = os.pread(fd, _TRAILER.size, begin)
        if len(end) != _TRAILER.size:
            return None
        num_bytes, num_label_bytes, crc, magic = _TRAILER.unpack(end)
        # Lengths before memory is taken for them.
        if magic != _MAGIC or num_bytes + num_label_bytes != begin:
            return None
        labels = os.pread(fd, num_label_bytes, num_bytes)
    finally:
        os.close(fd)
    if len(labels) != num_label_bytes or labels_crc(num_bytes, labels) != crc:
        return None
    return FileForm(num_bytes, labels, status.st_mtime_ns)
