"""What is to outlive the server, in a file of lines: one of JSON for each change, of which the last holds.

Lines are only appended, and the file is written anew, as a whole, where half of it says nothing any more.
"""

import logging
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from kvkeep.cache.lifetimes.appended_line import append_line, replace_content

__all__ = ["VERSION", "KeptLine", "KeptLines"]

_log = logging.getLogger(__name__)
VERSION = 1
# Lines that may say nothing any more before a file is written anew.
_FEWEST_STALE = 64

Line = TypeVar("Line", bound="KeptLine")


class _AnyLine(msgspec.Struct, frozen=True):
    v: int


class KeptLine(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A change: what holds from now on of what the line is about, or that nothing does. `v` is VERSION."""

    v: int
    gone: bool = False


class KeptLines(Generic[Line]):
    """The file at `path`, for one thread at a time; `what` is in it, in the words of a warning.

    `place_of` says what a line is about.
    A file that cannot be read or written costs what is in it, no request: there is one warning. Only its
    owner may read it, and what was removed is out of it at the latest after `tidy`.
    """

    def __init__(
        self, path: Path, line_type: type[Line], place_of: Callable[[Line], Hashable], what: str
    ) -> None:
        self._path = path
        self._line_type = line_type
        self._place_of = place_of
        self._what = what
        self._num_lines = self._num_known = 0
        self._is_newer = self._has_warned = False

    def load(self) -> list[Line]:
        """What holds, the oldest first."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn(error)
            return []
        return self._held(content)

    def append(self, line: Line) -> None:
        """Write down a change."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, msgspec.json.encode(line))
            self._num_lines += 1
            if self._num_lines > 2 * self._num_known + _FEWEST_STALE:
                self._write_anew()
        except OSError as error:
            self._warn(error)

    def tidy(self) -> None:
        """Leave nothing in the file that does not hold; where nothing does it goes."""
        try:
            self._write_anew()
        except OSError as error:
            self._warn(error)

    def _held(self, content: bytes) -> list[Line]:
        """What holds of this; lines that were cut off are passed over."""
        known: dict[Hashable, Line] = {}
        texts = [text for text in content.splitlines() if text]
        for text in texts:
            try:
                if msgspec.json.decode(text, type=_AnyLine).v != VERSION:
                    self._is_newer = True
                    continue
                line = msgspec.json.decode(text, type=self._line_type)
            except msgspec.DecodeError:
                continue  # cut off by a crash: its change was not answered yet
            place = self._place_of(line)
            known.pop(place, None)
            if not line.gone:
                known[place] = line
        self._num_lines, self._num_known = len(texts), len(known)
        return list(known.values())

    def _write_anew(self) -> None:
        with suppress(FileNotFoundError):
            replace_content(self._path, self._shortened)

    def _shortened(self, content: bytes) -> bytes:
        lines = self._held(content)
        # A later version of kvkeep has lines here that this one cannot judge.
        if self._is_newer or len(lines) == self._num_lines:
            return content
        self._num_lines = len(lines)
        return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("%s are not kept over a restart: %s", self._what, error)
