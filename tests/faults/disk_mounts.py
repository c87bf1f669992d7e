"""Real file systems for faults: a small one, a read-only one, one whose disk fails. Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["failing_disk", "read_only", "small_disk"]


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    with _mounted(["-t", "tmpfs", "-o", f"size={num_bytes}", "none"], folder / "small") as path:
        yield path


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make what is below a folder read-only for all that opens it anew."""
    with _mounted(["--bind", str(folder)], folder):
        _run(["mount", "-o", "remount,bind,ro", str(folder)])
        yield


class FailingDisk:
    """A file system on a disk of which nearly all can be lost, and found again."""

    def __init__(self, image: Path, path: Path, num_bytes: int) -> None:
        self.path = path
        self._image = image
        self._num_bytes = num_bytes

    def fail(self, *paths: Path) -> None:
        """From now on reads of these files fail, whose bytes are on the disk already."""
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        self._content = self._image.read_bytes()
        os.truncate(self._image, 1 << 20)

    def mend(self) -> None:
        """The disk works again and has all it had."""
        with self._image.open("r+b") as file:
            file.write(self._content)


@contextmanager
def failing_disk(folder: Path, num_bytes: int = 32 << 20) -> Iterator[FailingDisk]:
    """A disk that works until it is told not to."""
    mkfs = shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip("needs mkfs.ext4")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(num_bytes)
    _run([mkfs, "-q", "-O", "^has_journal", str(image)])
    with _mounted(["-o", "loop,noatime", str(image)], folder / "failing") as path:
        yield FailingDisk(image, path, num_bytes)


@contextmanager
def _mounted(arguments: list[str], path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    path.mkdir(exist_ok=True)
    command = ["mount", *arguments, str(path)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a file system here: {mount.stderr.strip()}")
    try:
        yield path
    finally:
        # Also when a test failed and left files open.
        _run(["umount", "--lazy", str(path)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
