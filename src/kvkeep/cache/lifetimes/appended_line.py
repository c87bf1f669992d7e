"""Lines of files that are only appended to, by several processes at once, any of which may be killed.

A file may be replaced by a shorter one: who writes and who reads it notices.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, flock
from pathlib import Path
from tempfile import NamedTemporaryFile

__all__ = ["FollowedFile", "append_line", "replace_content"]


def append_line(path: Path, text: bytes) -> None:
    """Write a line in one go; the file is made where there is none, for its owner alone. Raises OSError."""
    with _locked(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, LOCK_SH) as fd:
        # A line of its own also behind one that was cut off.
        os.write(fd, b"\n" + text + b"\n")


def replace_content(path: Path, shorten: Callable[[bytes], bytes]) -> int:
    """Replace a file by what `shorten` makes of it, while nobody appends; where that is nothing it goes.

    Returns how many bytes are left. Raises OSError.
    """
    with _locked(path, os.O_RDONLY, LOCK_EX) as fd:
        before = _content(fd, 0)
        after = shorten(before)
        if not after:
            path.unlink()
        elif after != before:
            _write_whole(path, after)
        return len(after)


class FollowedFile:
    """What others append to a file, of which nothing is missed when somebody replaces it meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Kept open: what was written to a file that is gone can be read, and its number is nobody else's.
        self._fd: int | None = None
        self._read_bytes = 0

    def read_on(self) -> bytes:
        """The whole lines that came since the last call, all of a new file; cheap when nothing has.

        Raises OSError.
        """
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if self._fd is None or there is None or os.fstat(self._fd).st_ino != there.st_ino:
            return self._rest() + (b"" if there is None else self._open_anew())
        return b"" if there.st_size == self._read_bytes else self._rest()

    def close(self) -> None:
        """Read no more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open_anew(self) -> bytes:
        self.close()
        self._read_bytes = 0
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        return self._rest()

    def _rest(self) -> bytes:
        if self._fd is None:
            return b""
        content = _content(self._fd, self._read_bytes)
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return whole


def _write_whole(path: Path, content: bytes) -> None:
    with NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        new = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    """The file that lies at `path` once the lock is had."""
    while True:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            flock(fd, lock)
            if _lies_at(path, fd):
                yield fd
                return
        finally:
            os.close(fd)


def _lies_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _content(fd: int, start: int) -> bytes:
    return os.pread(fd, max(0, os.fstat(fd).st_size - start), start)
