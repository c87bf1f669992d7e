"""Purges that have begun, on a disk, so that a crash in the middle is made good at the next start.

One line of JSON for each purge that begins, `{"v": 1, "id": ..., "at": ..., "query": {...}}`, and one for
each that is finished, `{"v": 1, "id": ..., "done": true}`; only lines are appended. A purge that is repeated
does no harm: it means nothing that was created after it began.
"""

import os
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from uuid import uuid4

import msgspec

from kvkeep.cache.lifetimes.selector import Query

__all__ = ["PurgeJournal", "Unfinished"]

_log = getLogger(__name__)
_VERSION = 1
_NAME = "purges.jsonl"
# A journal without unfinished purges is begun anew beyond this.
_MOST_BYTES = 1 << 16


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    id: str
    at: float = 0.0
    query: Query | None = None
    done: bool = False


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A purge that was begun, and may not have come to its end."""

    purge_id: str
    query: Query


class PurgeJournal:
    """The journal in a folder. A medium that fails costs the journal, not the purge: there is one warning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._has_warned = False
        self._num_open = 0

    def begin(self, query: Query, now_s: float) -> str:
        """Write down, before it begins, what is to be purged; returns the name of the purge."""
        purge_id = uuid4().hex
        self._num_open += 1
        self._append(_Line(_VERSION, purge_id, at=now_s, query=query))
        return purge_id

    def finish(self, purge_id: str) -> None:
        """All of it is gone."""
        self._num_open -= 1
        self._append(_Line(_VERSION, purge_id, done=True))

    def unfinished(self) -> list[Unfinished]:
        """What was begun and not finished, the oldest first; to be called before anything is served."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self._warn(error)
            return []
        begun: dict[str, Unfinished] = {}
        for line in lines:
            try:
                one = msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError:
                continue  # cut off when the process was killed: its purge had not begun
            if one.v != _VERSION:
                continue
            if one.done:
                begun.pop(one.id, None)
            elif one.query is not None:
                before = one.query.created_before
                at = one.at if before is None else min(before, one.at)
                begun[one.id] = Unfinished(one.id, replace(one.query, created_before=at))
        self._num_open = len(begun)
        if not begun and lines:
            self._start_anew()
        return list(begun.values())

    def _append(self, line: _Line) -> None:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                # A line of its own also behind one that was cut off.
                os.write(fd, b"\n" + msgspec.json.encode(line) + b"\n")
                os.fsync(fd)
            finally:
                os.close(fd)
            if not self._num_open and self._path.stat().st_size > _MOST_BYTES:
                self._start_anew()
        except OSError as error:
            self._warn(error)

    def _start_anew(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("purges are not written down, so a crash can interrupt one: %s", error)
