"""An object as a file: its bytes, its labels, and a trailer that says how long both are: see `trailer`.

So a folder of files says all that an index of it says. A file takes as many blocks of the disk as an object
and labels of these lengths need, whatever zeros there are between them.
"""

import os
from dataclasses import dataclass
from time import sleep

from kvkeep.spec import StoredKey
from kvkeep.tiers.trailer import TRAILER_BYTES, labels_at_end, parse_trailer

__all__ = [
    "FileForm",
    "file_bytes",
    "form_of",
    "is_name",
    "key_of_name",
    "name_of_key",
    "read_form",
    "taken_bytes",
    "whole_blocks",
]

_DISK_BLOCK_BYTES = 4096
_MOST_NAME_CHARACTERS = 254
# Of labels that are read together with the trailer.
_END_BYTES = 512
# Who reads while another writes labels into the same page sees half of them, for some microseconds.
_NUM_TRIES, _PAUSE_S = 3, 1e-3


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
    return num_bytes + num_label_bytes + TRAILER_BYTES


def taken_bytes(num_bytes: int, num_label_bytes: int) -> int:
    """What an object's file takes of a disk."""
    return whole_blocks(file_bytes(num_bytes, num_label_bytes))


def whole_blocks(length: int) -> int:
    """What a file of a length takes of a disk, which has blocks of 4096 bytes."""
    return -(-length // _DISK_BLOCK_BYTES) * _DISK_BLOCK_BYTES


def read_form(path: str) -> FileForm | None:
    """What the file says of itself, None where it is not whole. Raises OSError, also where there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return form_of(fd)
    finally:
        os.close(fd)


def form_of(fd: int) -> FileForm | None:
    """What an open file says of itself, None where it is not whole."""
    for at in range(_NUM_TRIES):
        if at:
            sleep(_PAUSE_S)
        form = _form_now(fd)
        if form is not None:
            return form
    return None


def _form_now(fd: int) -> FileForm | None:
    status = os.fstat(fd)
    length = status.st_size
    end = os.pread(fd, _END_BYTES, max(0, length - _END_BYTES))
    trailer = parse_trailer(end)
    if trailer is None:
        return None
    # Lengths before memory is taken for them.
    needed = trailer.num_bytes + trailer.tail_bytes
    if needed > length or whole_blocks(needed) != whole_blocks(length):
        return None
    if trailer.tail_bytes > len(end):
        end = os.pread(fd, trailer.tail_bytes, length - trailer.tail_bytes)
    labels = labels_at_end(end, trailer)
    if labels is None:
        return None
    return FileForm(trailer.num_bytes, labels, status.st_mtime_ns)
