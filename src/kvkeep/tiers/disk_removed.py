"""Files that have lost their names under a lock, and are ended outside of it: what takes long comes then."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvkeep.tiers.catalog import Evicted
from kvkeep.tiers.disk_files import Detached, ObjectFiles
from kvkeep.tiers.disk_form import taken_bytes, whole_blocks

__all__ = ["Removed", "counted_bytes"]

# A process may have a thousand files open, as a rule, and others need some of them.
_MOST_OPEN = 64


def counted_bytes(item: Evicted) -> int:
    """What the ledger counts for the file of an evicted object."""
    return taken_bytes(item.num_bytes, len(item.labels))


class Removed:
    """Files without a name, and at most one with a new name, which is to be written over."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._num_bytes = 0
        self._recycled: _Recycled | None = None

    def add(self, file: Detached, num_bytes: int) -> None:
        """A file for which the ledger counts so many bytes."""
        if len(self._fds) >= _MOST_OPEN:
            self._close()
        self._fds.append(file.fd)
        self._num_bytes += num_bytes

    def recycle(self, files: ObjectFiles, item: Evicted, path: str) -> bool:
        """Give an object's file a new name; whether it had one."""
        if not files.recycle(item.key, path):
            return False
        self._recycled = _Recycled(path, counted_bytes(item))
        self._num_bytes += self._recycled.num_bytes
        return True

    def cut_off(self, length: int) -> None:
        """Give back what a recycled file has more than a new one needs."""
        if self._recycled is not None and self._recycled.num_bytes > whole_blocks(length):
            os.truncate(self._recycled.path, length)

    def end(self) -> int:
        """Close the files, which frees their blocks; what the ledger counts for all that went since."""
        self._close()
        num_bytes, self._num_bytes = self._num_bytes, 0
        return num_bytes

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def drop(self) -> None:
        """Remove the recycled file, for which there is no use; does not fail."""
        if self._recycled is not None:
            with suppress(OSError):
                Path(self._recycled.path).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Recycled:
    path: str
    num_bytes: int
