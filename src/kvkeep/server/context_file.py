"""Contexts in a file, so that their names outlive the server.

One line of JSON for each change, `{"v": 1, "model": ..., "name": ..., "salt": ..., "tokens": ...}` with the
other fields of a Context, or `"gone": true` in their place; `tokens` are uint32, little-endian, in base64.
Of a name the last line holds. Lines are only appended, and the file is written anew, as a whole, where half
of it says nothing any more.
"""

import logging
import sys
from array import array
from contextlib import suppress
from pathlib import Path

import msgspec

from kvkeep.cache.lifetimes.appended_line import append_line, replace_content
from kvkeep.server.cache_contexts import Context

__all__ = ["ContextFile"]

_log = logging.getLogger(__name__)
_VERSION = 1
_TOKEN_BYTES = 4
# Lines that may say nothing any more before a file is written anew.
_FEWEST_STALE = 64


class _AnyLine(msgspec.Struct, frozen=True):
    v: int


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    model: str
    name: str
    salt: str | None = None
    tokens: bytes = b""
    tags: tuple[str, ...] = ()
    ttl: float | str | None = None
    pin: str | None = None
    created_at: float = 0.0
    warmed_at: float = 0.0
    owner: str | None = None
    gone: bool = False

    @property
    def place(self) -> tuple[str, str | None, str]:
        return self.model, self.salt, self.name


class ContextFile:
    """The file at `path`, for one thread at a time; contexts of all models that are served over a folder.

    A file that cannot be read or written costs names, no request: there is one warning. It holds prompts, so
    that only its owner may read it, and what was removed is out of it at the latest after `tidy`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_lines = self._num_known = 0
        self._is_newer = self._has_warned = False

    def load(self, model: str) -> list[Context]:
        """The contexts of a model that are in the file."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn(error)
            return []
        return [_context(line) for line in self._held(content) if line.model == model]

    def put(self, model: str, context: Context) -> None:
        """Write down a context as it is now."""
        self._append(
            _Line(
                v=_VERSION,
                model=model,
                name=context.name,
                salt=context.salt,
                tokens=_little_endian(context.token_ids).tobytes(),
                tags=context.tags,
                ttl=context.ttl,
                pin=context.pin,
                created_at=context.created_at,
                warmed_at=context.warmed_at,
                owner=context.owner,
            )
        )

    def remove(self, model: str, context: Context) -> None:
        """Write down that a context is no more."""
        self._append(
            _Line(v=_VERSION, model=model, name=context.name, salt=context.salt, gone=True)
        )

    def tidy(self) -> None:
        """Leave nothing in the file that does not hold: when it is closed, and when somebody is erased."""
        try:
            self._write_anew()
        except OSError as error:
            self._warn(error)

    def _held(self, content: bytes) -> list[_Line]:
        """What holds of the file, the oldest first; lines that were cut off are passed over."""
        known: dict[tuple[str, str | None, str], _Line] = {}
        texts = [text for text in content.splitlines() if text]
        for text in texts:
            try:
                if msgspec.json.decode(text, type=_AnyLine).v != _VERSION:
                    self._is_newer = True
                    continue
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.DecodeError:
                continue  # cut off by a crash: its change was not answered yet
            if len(line.tokens) % _TOKEN_BYTES:
                continue
            known.pop(line.place, None)
            if not line.gone:
                known[line.place] = line
        self._num_lines, self._num_known = len(texts), len(known)
        return list(known.values())

    def _append(self, line: _Line) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, msgspec.json.encode(line))
            self._num_lines += 1
            if self._num_lines > 2 * self._num_known + _FEWEST_STALE:
                self._write_anew()
        except OSError as error:
            self._warn(error)

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
            _log.warning("names of contexts are not kept over a restart: %s", error)


def _context(line: _Line) -> Context:
    return Context(
        name=line.name,
        salt=line.salt,
        token_ids=_little_endian(array("I", line.tokens)),
        tags=line.tags,
        ttl=line.ttl,
        pin=line.pin,
        created_at=line.created_at,
        warmed_at=line.warmed_at,
        owner=line.owner,
    )


def _little_endian(tokens: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        tokens = tokens[:]
        tokens.byteswap()
    return tokens
