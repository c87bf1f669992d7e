"""Files of objects: written under another name, renamed, read straight into buffers. Raises OSError."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import time_ns

from kvkeep.spec import StoredKey
from kvkeep.tiers.disk_form import (
    FileForm,
    file_bytes,
    form_of,
    key_of_name,
    name_of_key,
    read_form,
    whole_blocks,
)
from kvkeep.tiers.trailer import TRAILER_BYTES, encode_tail, labels_behind

__all__ = ["Detached", "FoundFile", "ObjectFiles"]

_NUM_FOLDERS = 256
_FOLDER_MODE, _FILE_MODE = 0o700, 0o600
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_COPY_BYTES = 1 << 20
# Of labels that come with the object in one call.
_TAIL_BYTES = 512
_MOST_QUARANTINED = 16
# -1 where the system sets no limit; 16 is what every one has.
_IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))
# What file systems say that do not know how to copy.
_CANNOT_COPY = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that a folder lists; `key` is None where its name is not that of an object."""

    path: str
    key: StoredKey | None
    num_bytes: int
    stamp: int


@dataclass(frozen=True, slots=True)
class Detached:
    """A file without a name: its blocks are free as soon as `fd`, and those of its readers, are closed."""

    fd: int
    num_bytes: int


class ObjectFiles:
    """The files below `folder`: `objects/ab/<key>`, and `quarantine/` for wrong ones."""

    def __init__(self, folder: str, *, is_durable: bool) -> None:
        self.is_durable = is_durable
        self._folder = Path(folder)
        self._quarantine = self._folder / "quarantine"
        # Text, where a call is made for every object: to make a Path takes as long as to open a file.
        self._objects = f"{folder}/objects"
        self._last_stamp = 0
        self._stamp_lock = Lock()

    def make_folders(self) -> None:
        """Make what is missing of the folders, for their owner only; below `objects` they come with files."""
        self._folder.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
        for path in (Path(self._objects), self._quarantine):
            path.mkdir(_FOLDER_MODE, exist_ok=True)

    def path(self, key: StoredKey) -> str:
        """Where the object lies, if it does."""
        name = name_of_key(key)
        return f"{self._objects}/{name[:2]}/{name}"

    def exists(self, key: StoredKey) -> bool:
        """Whether there is a file of the object."""
        return os.path.exists(self.path(key))  # noqa: PTH110

    def form(self, key: StoredKey) -> FileForm | None:
        """What the object's file says of itself, None where it is not whole."""
        return read_form(self.path(key))

    def read(self, key: StoredKey, buffers: Sequence[memoryview], wanted: int) -> bytes | None:
        """Fill buffers of `wanted` bytes in all; the object's labels, None where the file is not whole."""
        tail, num_read = memoryview(bytearray(_TAIL_BYTES)), 0
        fd = os.open(self.path(key), _READ)
        try:
            if len(buffers) < _IOV_MAX:
                num_read = os.preadv(fd, [*buffers, tail], 0)
                labels = labels_behind(tail[: max(0, num_read - wanted)], wanted)
                if labels is not None:
                    return labels
            if num_read < wanted and not _read_all(fd, buffers):
                return None
            form = form_of(fd)
            return None if form is None or form.num_bytes != wanted else form.labels
        finally:
            os.close(fd)

    def write(
        self, path: str, parts: Iterable[memoryview], num_bytes: int, labels: bytes
    ) -> int | None:
        """Make a file of an object; its stamp, or None where parts are of another length.

        A file that is there is written over, which is faster than to make one and to remove another.
        """
        trailer = memoryview(encode_tail(num_bytes, labels))
        fd = os.open(path, _WRITE, _FILE_MODE)
        try:
            if isinstance(parts, list | tuple):
                if sum([part.nbytes for part in parts]) != num_bytes:
                    return None
                _write_all(fd, [*parts, trailer])
            else:
                # A source may use a part's memory again for the next one.
                rest = num_bytes
                for part in parts:
                    rest -= part.nbytes
                    if rest < 0:
                        return None
                    _write_all(fd, [part])
                if rest:
                    return None
                _write_all(fd, [trailer])
            return self._finish(fd, file_bytes(num_bytes, len(labels)))
        finally:
            os.close(fd)

    def relabel(self, key: StoredKey, num_bytes: int, labels: bytes) -> int | None:
        """Write other labels into the object's file; its stamp, or None where that takes a copy.

        It is one write into one block, which a kill leaves undone or done. Who reads the old labels meanwhile
        may see half of them, and then reads again.
        """
        fd = os.open(self.path(key), os.O_RDWR | os.O_CLOEXEC)
        try:
            # Another process may write there.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            num_there = os.fstat(fd).st_size - num_bytes
            tail = encode_tail(num_bytes, labels, least_bytes=num_there)
            is_one_block = whole_blocks(num_bytes + 1) == whole_blocks(num_bytes + len(tail))
            if num_there < TRAILER_BYTES or not is_one_block:
                return None
            if os.pwrite(fd, tail, num_bytes) != len(tail):
                return None
            return self._stamp(fd)
        except BlockingIOError:
            return None
        finally:
            os.close(fd)

    def copy(self, key: StoredKey, path: str, num_bytes: int, labels: bytes) -> int | None:
        """Make a file of the same object with other labels; its stamp, or None where that is not whole."""
        try:
            source = os.open(self.path(key), _READ)
        except FileNotFoundError:
            return None
        try:
            fd = os.open(path, _WRITE, _FILE_MODE)
            try:
                if not _copy(source, fd, num_bytes):
                    return None
                _write_all(fd, [memoryview(encode_tail(num_bytes, labels))])
                return self._finish(fd, file_bytes(num_bytes, len(labels)))
            finally:
                os.close(fd)
        finally:
            os.close(source)

    def rename(self, path: str, key: StoredKey) -> None:
        """Make a file the object's, instead of one that there may be; its folder is made if it is gone."""
        target = self.path(key)
        try:
            os.replace(path, target)  # noqa: PTH105
        except FileNotFoundError:
            Path(target).parent.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
            Path(path).replace(target)

    def claim(self, path: str, key: StoredKey) -> None:
        """Make a file the object's; raises FileExistsError where there is one."""
        if self.exists(key):
            raise FileExistsError(self.path(key))
        self.rename(path, key)

    def exchange(self, path: str, key: StoredKey) -> int:
        """Make a file the object's instead of the one there is; the length of that one."""
        num_bytes = Path(self.path(key)).stat().st_size
        self.rename(path, key)
        return num_bytes

    def settle(self, key: StoredKey) -> None:
        """Wait until a rename survives a power cut, where that is asked for."""
        self._settle(str(Path(self.path(key)).parent))

    def settle_labels(self, key: StoredKey) -> None:
        """Wait until labels that were written into a file survive a power cut, where that is asked for."""
        self._settle(self.path(key))

    def detach(self, key: StoredKey) -> Detached | None:
        """Take an object's name away; None where there is none. The caller closes the file."""
        path = self.path(key)
        try:
            fd = os.open(path, _READ)
        except FileNotFoundError:
            return None
        try:
            os.unlink(path)  # noqa: PTH108
            return Detached(fd, os.fstat(fd).st_size)
        except OSError as error:
            os.close(fd)
            if isinstance(error, FileNotFoundError):
                return None
            raise

    def recycle(self, key: StoredKey, path: str) -> bool:
        """Give an object's file another name, under which it is written over; whether there was one.

        Who has it open reads what is written then: the caller knows that nobody does.
        """
        try:
            os.rename(self.path(key), path)  # noqa: PTH104
        except FileNotFoundError:
            return False
        return True

    def put_aside(self, key: StoredKey, most_bytes: int) -> int | None:
        """Move an object into quarantine, of which the newest few are kept; the length of its file, or None.

        No more than `most_bytes` are kept there in all.
        """
        source = Path(self.path(key))
        self._quarantine.mkdir(_FOLDER_MODE, exist_ok=True)
        try:
            num_bytes = source.stat().st_size
            source.rename(self._quarantine / f"{self._next_stamp():020d}-{source.name}")
        except FileNotFoundError:
            return None
        self._trim_quarantine(most_bytes)
        return num_bytes

    def listing(self) -> Iterator[list[FoundFile]]:
        """All files of objects, folder by folder; what comes and goes meanwhile may be missing."""
        for number in range(_NUM_FOLDERS):
            found = []
            with suppress(FileNotFoundError), os.scandir(self._fan(number)) as entries:
                for entry in entries:
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        key = key_of_name(entry.name)
                        if key is not None and key[0] != number:
                            key = None
                        size, stamp = status.st_size, status.st_mtime_ns
                        found.append(FoundFile(entry.path, key, size, stamp))
            yield found

    def _fan(self, number: int) -> str:
        return f"{self._objects}/{number:02x}"

    def _finish(self, fd: int, length: int) -> int:
        """Cut a file to its length, stamp it, and see it to the disk where that is asked for."""
        if os.fstat(fd).st_size != length:
            os.ftruncate(fd, length)
        stamp = self._stamp(fd)
        if self.is_durable:
            os.fsync(fd)
        return stamp

    def _stamp(self, fd: int) -> int:
        stamp = self._next_stamp()
        os.utime(fd, ns=(stamp, stamp))
        return stamp

    def _settle(self, path: str) -> None:
        if not self.is_durable:
            return
        try:
            fd = os.open(path, _READ)
        except FileNotFoundError:
            return  # deleted by now, and nothing else was there
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _next_stamp(self) -> int:
        """The time, made later than all before it: clocks are coarse, and can be set back."""
        with self._stamp_lock:
            self._last_stamp = max(time_ns(), self._last_stamp + 1)
            return self._last_stamp

    def _trim_quarantine(self, most_bytes: int) -> None:
        rest_bytes = most_bytes
        for at, path in enumerate(sorted(self._quarantine.iterdir(), reverse=True)):
            with suppress(FileNotFoundError):
                rest_bytes -= path.stat().st_size
                if at >= _MOST_QUARANTINED or rest_bytes < 0:
                    path.unlink()


def _write_all(fd: int, parts: Sequence[memoryview]) -> None:
    rest = list(parts)
    while rest:
        rest = _behind(rest, os.writev(fd, rest[:_IOV_MAX]))


def _read_all(fd: int, buffers: Sequence[memoryview]) -> bool:
    """Whether the file, from its begin, fills all buffers."""
    rest, offset = _behind(buffers, 0), 0
    while rest:
        num_read = os.preadv(fd, rest[:_IOV_MAX], offset)
        if not num_read:
            return False
        offset += num_read
        rest = _behind(rest, num_read)
    return True


def _behind(parts: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of parts behind so many bytes."""
    for at, part in enumerate(parts):
        if num_bytes < part.nbytes:
            cut = part.cast("B")[num_bytes:] if num_bytes else part
            return [cut, *parts[at + 1 :]]
        num_bytes -= part.nbytes
    return []


def _copy(source: int, target: int, num_bytes: int) -> bool:
    """Copy the first bytes of a file, in the kernel where it can; False where there are fewer."""
    copy = getattr(os, "copy_file_range", _copy_through_memory)
    while num_bytes:
        try:
            num_copied = copy(source, target, num_bytes)
        except OSError as error:
            if copy is _copy_through_memory or error.errno not in _CANNOT_COPY:
                raise
            copy = _copy_through_memory
            continue
        if not num_copied:
            return False
        num_bytes -= num_copied
    return True


def _copy_through_memory(source: int, target: int, num_bytes: int) -> int:
    piece = os.read(source, min(num_bytes, _COPY_BYTES))
    _write_all(target, [memoryview(piece)])
    return len(piece)
