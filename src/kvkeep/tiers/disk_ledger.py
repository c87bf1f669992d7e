"""Who writes to a folder, and how many bytes all of them have taken there together.

Each process has a folder of its own for unfinished files, `partial/<token>/`, with a file `alive` in it that
it keeps locked: the system unlocks it when the process ends, however it ends. `ledger` is a small file:

    0       8 bytes   magic "KVKEEPU1"
    8       8 bytes   bytes of all files that no living process accounts for, little-endian, signed
    16      32 bytes  a slot for each process: token (16 bytes, zeros: free), bytes it has added less those
    ...               it removed (8 bytes, signed), bytes of its files in flight (8 bytes)

It is read and changed under a lock on the file itself, which nobody holds longer than for a few calls to the
system. Bytes are entered before a file appears and taken off after it has gone, so that a process that is
killed in between leaves the sum too high, never too low; the next one that starts alone counts anew.
"""

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_bytes
from threading import Lock
from time import monotonic, sleep
from typing import TypeVar

__all__ = ["FolderLedger"]

T = TypeVar("T")
_MAGIC = b"KVKEEPU1"
_HEAD = struct.Struct("<8sq")
_SLOT = struct.Struct("<16sqq")
_COUNTS = struct.Struct("<qq")
_TOKEN_BYTES = 16
_FREE = bytes(_TOKEN_BYTES)
_TOKEN = re.compile(r"[0-9a-f]{32}")
_MOST_BYTES = 1 << 20
_LOCK_WAIT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 50e-6, 2e-3


@dataclass(slots=True)
class _Page:
    """What the file says."""

    base: int
    slots: list[tuple[bytes, int, int]]

    @property
    def total(self) -> int:
        return self.base + sum([added + in_flight for _, added, in_flight in self.slots])


class FolderLedger:
    """This process's part in a folder, with a folder `partial` of its own. Thread-safe; raises OSError."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / "ledger"
        self._partials = Path(folder) / "partial"
        self._token = _FREE
        self.partial = ""
        # When the file was read last.
        self.was_alone = False
        self._fd = self._alive_fd = -1
        self._slot = 0
        self._added = self._in_flight = 0
        self._lock = Lock()

    def open(self) -> bool:
        """Enter the folder, removing what dead processes left; whether no other process is there."""
        with self._lock:
            self._close_files()
            self._token = token_bytes(_TOKEN_BYTES)
            self.partial = str(self._partials / self._token.hex())
            self._added = 0
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                with self._alone():
                    return self._enter()
            except BaseException:
                self._close_files()
                raise

    def is_current(self) -> bool:
        """Whether the folder is still the one that was entered, and this process's part of it is there."""
        try:
            with self._lock:
                is_same = os.path.samestat(self._path.stat(), os.fstat(self._fd))
                return (
                    is_same
                    and self._has_slot(self._read())
                    and Path(self.partial, "alive").exists()
                )
        except OSError:
            return False

    def count_all(self, num_bytes: int) -> None:
        """Say that the files there are have so many bytes, those in flight aside."""
        with self._lock, self._alone():
            page = self._read()
            others = sum(added for token, added, _ in page.slots if token != self._token)
            page.base = num_bytes - others
            self._added = 0
            self._write(page)
            self._write_own()

    @property
    def num_others(self) -> int:
        """How many other processes are there; some may be dead."""
        with self._lock:
            return self._num_others(self._read())

    @property
    def total_bytes(self) -> int:
        """What all processes have taken, files in flight included."""
        with self._lock:
            return self._read().total

    def reserve(self, num_bytes: int, capacity_bytes: int, *, freed_bytes: int = 0) -> int:
        """Take bytes for a file in flight; 0, or how many have to go first, and none are taken.

        `freed_bytes` are taken off before, for files that went.
        """
        with self._lock:
            self._added -= freed_bytes
            self._hold()
            try:
                if freed_bytes:
                    self._write_own()
                missing = self._read().total + num_bytes - capacity_bytes
                if missing > 0:
                    return missing
                self._in_flight += num_bytes
                self._write_own()
                return 0
            finally:
                self._let_go()

    def give_up(self, num_bytes: int) -> None:
        """End a file in flight that came to nothing."""
        self._count(0, -num_bytes)

    def land(self, num_bytes: int, appear: Callable[[], T]) -> T:
        """Make a file in flight a file, by `appear`, while no other process does so; what that returns.

        When it raises, the file is in flight still.
        """
        with self._lock:
            self._hold()
            try:
                self._move(num_bytes)
                self._write_own()
                return appear()
            except BaseException:
                self._move(-num_bytes)
                with suppress(OSError):
                    self._write_own()
                raise
            finally:
                self._let_go()

    def add(self, num_bytes: int) -> None:
        """Count bytes of files that appeared (or, less than 0, went) without being in flight."""
        self._count(num_bytes, 0)

    def sweep(self) -> None:
        """Remove what processes left that died since."""
        with self._lock, self._alone():
            self._write(self._sweep())

    def close(self) -> None:
        """Leave the folder; calling it again does nothing."""
        with self._lock:
            if self._fd < 0:
                return
            with suppress(OSError), self._alone():
                page = self._read()
                if self._has_slot(page):
                    page.base += self._added
                    page.slots[self._slot] = (_FREE, 0, 0)
                    self._write(page)
            with suppress(OSError):
                _remove_folder(Path(self.partial))
            self._close_files()

    def _enter(self) -> bool:
        """Take a slot; whether all others are free. The lock is held."""
        page = self._sweep()
        path = Path(self.partial)
        path.mkdir(0o700)
        self._alive_fd = os.open(path / "alive", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._alive_fd, fcntl.LOCK_EX)
        tokens = [token for token, _, _ in page.slots]
        self._slot = tokens.index(_FREE) if _FREE in tokens else len(tokens)
        page.slots[self._slot : self._slot + 1] = [(self._token, 0, self._in_flight)]
        self._write(page)
        return self._num_others(page) == 0

    def _has_slot(self, page: _Page) -> bool:
        return self._slot < len(page.slots) and page.slots[self._slot][0] == self._token

    def _num_others(self, page: _Page) -> int:
        return sum([token not in (_FREE, self._token) for token, _, _ in page.slots])

    def _sweep(self) -> _Page:
        """The file's content without the dead; the lock is held."""
        page, alive = self._read(), {self._token.hex()}
        self._partials.mkdir(0o700, exist_ok=True)
        for path in list(self._partials.iterdir()):
            if not _TOKEN.fullmatch(path.name):
                continue
            if path.name in alive or _is_locked(path / "alive"):
                alive.add(path.name)
            else:
                _remove_folder(path)
        # One that lives and has no slot entered a file that is gone; it will find out.
        known = {token.hex() for token, _, _ in page.slots} | {self._token.hex()}
        page.slots += [(bytes.fromhex(name), 0, 0) for name in sorted(alive - known)]
        for at, (token, added, _) in enumerate(page.slots):
            if token != _FREE and token.hex() not in alive:
                page.base += added
                page.slots[at] = (_FREE, 0, 0)
        while page.slots and page.slots[-1][0] == _FREE:
            page.slots.pop()
        return page

    def _read(self) -> _Page:
        content = os.pread(self._fd, _MOST_BYTES, 0)
        rest = (len(content) - _HEAD.size) % _SLOT.size
        if len(content) < _HEAD.size or content[:8] != _MAGIC:
            return _Page(0, [])
        base = _HEAD.unpack_from(content)[1]
        page = _Page(base, list(_SLOT.iter_unpack(content[_HEAD.size : len(content) - rest])))
        self.was_alone = self._num_others(page) == 0
        return page

    def _write(self, page: _Page) -> None:
        content = _HEAD.pack(_MAGIC, page.base) + b"".join(_SLOT.pack(*slot) for slot in page.slots)
        os.pwrite(self._fd, content, 0)
        os.ftruncate(self._fd, len(content))

    def _count(self, added: int, in_flight: int) -> None:
        """What cannot be written now is written with the next change."""
        with self._lock:
            self._added += added
            self._in_flight += in_flight
            with suppress(OSError), self._alone():
                self._write_own()

    def _move(self, num_bytes: int) -> None:
        self._in_flight -= num_bytes
        self._added += num_bytes

    def _write_own(self) -> None:
        offset = _HEAD.size + self._slot * _SLOT.size + _TOKEN_BYTES
        os.pwrite(self._fd, _COUNTS.pack(self._added, self._in_flight), offset)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._hold()
        try:
            yield
        finally:
            self._let_go()

    def _hold(self) -> None:
        """Take the lock between processes; raises TimeoutError when one that is stopped holds it."""
        if self._fd < 0:
            raise OSError(errno.EBADF, "the ledger is not open")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _wait_for_lock(self._fd)

    def _let_go(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _close_files(self) -> None:
        for fd in (self._fd, self._alive_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._alive_fd = -1


def _wait_for_lock(fd: int) -> None:
    pause_s, until = _FIRST_PAUSE_S, monotonic() + _LOCK_WAIT_S
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if monotonic() > until:
            raise TimeoutError("another process holds the lock of the ledger, and does not go on")
        sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _is_locked(path: Path) -> bool:
    """Whether the process that made the file lives."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # nobody is declared dead for a fault of the medium
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_folder(path: Path) -> None:
    """Remove a folder of unfinished files."""
    for file in list(path.iterdir()):
        file.unlink(missing_ok=True)
    path.rmdir()
