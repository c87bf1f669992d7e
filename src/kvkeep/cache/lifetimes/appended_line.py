"""Lines of files that are only appended to, by several processes at once, any of which may be killed."""

import os
from pathlib import Path

__all__ = ["append_line"]


def append_line(path: Path, text: bytes) -> None:
    """Write a line in one go; the file is made where there is none, for its owner alone. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # A line of its own also behind one that was cut off.
        os.write(fd, b"\n" + text + b"\n")
    finally:
        os.close(fd)
