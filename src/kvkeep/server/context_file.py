"""Contexts in a file, so that their names outlive the server.

A line has the fields of a Context, whose `tokens` are uint32, little-endian, in base64.
"""

import sys
from array import array
from pathlib import Path

from kvkeep.server.cache_contexts import Context
from kvkeep.server.kept_lines import VERSION, KeptLine, KeptLines

__all__ = ["ContextFile"]

_TOKEN_BYTES = 4


class _Line(KeptLine, frozen=True, omit_defaults=True, kw_only=True):
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

    def __post_init__(self) -> None:
        if len(self.tokens) % _TOKEN_BYTES:
            raise ValueError("tokens end within one")  # a line of which this is said was cut off


class ContextFile:
    """The file at `path`, for one thread at a time; contexts of all models that are served over a folder."""

    def __init__(self, path: Path) -> None:
        self._lines = KeptLines(
            path, _Line, lambda line: (line.model, line.salt, line.name), "names of contexts"
        )

    def load(self, model: str) -> list[Context]:
        """The contexts of a model that are in the file."""
        return [_context(line) for line in self._lines.load() if line.model == model]

    def put(self, model: str, context: Context) -> None:
        """Write down a context as it is now."""
        self._lines.append(
            _Line(
                v=VERSION,
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
        self._lines.append(
            _Line(v=VERSION, model=model, name=context.name, salt=context.salt, gone=True)
        )

    def tidy(self) -> None:
        """Leave nothing in the file that does not hold: when it is closed, and when somebody is erased."""
        self._lines.tidy()


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
