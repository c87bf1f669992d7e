"""Purges that have begun, on a disk, so that a crash in the middle is made good at the next start.

One line of JSON for each purge that begins, `{"v": 2, "id": ..., "at": ..., "query": {...}}`, and one for
each that is finished, `{"v": 2, "id": ..., "done": true}`; only lines are appended. Between them may be
`{"v": 2, "id": ..., "left": {"tier": [...]}}`, objects of which a tier that did not answer has yet to hear:
what it says of them itself may be old. A purge that is repeated does no harm: it means nothing that was
created after it began. Several processes may write to one journal, and each reads what the others begin.

A line survives this process when `begin` returns, and a failure of power once `sync` was called, which waits
for the medium and comes before anything is deleted.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from threading import Lock
from uuid import uuid4

import msgspec

from kvkeep.cache.lifetimes.appended_line import append_line
from kvkeep.cache.lifetimes.selector import Query
from kvkeep.spec import StoredKey

__all__ = ["PurgeJournal", "Unfinished"]

_log = getLogger(__name__)
# A query of version 1 has fewer fields.
_VERSION = 2
_READABLE = (1, 2)
_NAME = "purges.jsonl"
# A journal without unfinished purges is begun anew beyond this.
_MOST_BYTES = 1 << 16


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    id: str
    at: float = 0.0
    query: Query | None = None
    done: bool = False
    left: dict[str, list[bytes]] = {}


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A purge that was begun, and may not have come to its end."""

    purge_id: str
    query: Query
    # By the names of tiers.
    left: dict[str, list[StoredKey]] = field(default_factory=dict)


class PurgeJournal:
    """The journal in a folder. A medium that fails costs the journal, not the purge: there is one warning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._has_warned = False
        self._num_open = 0
        # Purges of this process, and how much of what others write has been read.
        self._own: set[str] = set()
        self._read_bytes = self._inode = 0
        self._is_synced = True
        self._syncing = Lock()

    def begin(self, query: Query, now_s: float) -> str:
        """Write down, before it begins, what is to be purged; returns the name of the purge."""
        purge_id = uuid4().hex
        self._own.add(purge_id)
        self._num_open += 1
        self._append(_Line(_VERSION, purge_id, at=now_s, query=query))
        return purge_id

    def leave(self, purge_id: str, name: str, keys: Sequence[StoredKey]) -> None:
        """A tier has yet to hear of these."""
        self._append(_Line(_VERSION, purge_id, left={name: list(keys)}))

    def finish(self, purge_id: str) -> None:
        """All of it is gone."""
        self._num_open -= 1
        self._append(_Line(_VERSION, purge_id, done=True))

    def sync(self) -> None:
        """Wait until all lines are on the medium; from any thread."""
        with self._syncing:
            if self._is_synced:
                return
            self._is_synced = True
            try:
                fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                pass  # begun anew: all purges are finished
            except OSError as error:
                self._warn(error)

    def unfinished(self) -> list[Unfinished]:
        """What was begun and not finished, the oldest first; to be called before anything is served."""
        content = self._read(0)
        begun = _unfinished(content)
        self._num_open = len(begun)
        self._own.update(one.id for one in _lines(content))
        if not begun and content:
            self._start_anew()
        return list(begun.values())

    def begun_by_others(self) -> list[Unfinished]:
        """What other processes have begun since the last call, or since `unfinished`; cheap when nothing."""
        try:
            there = self._path.stat()
        except OSError:
            return []
        is_same = there.st_ino == self._inode and there.st_size >= self._read_bytes
        if is_same and there.st_size == self._read_bytes:
            return []
        # Somebody may have begun it anew.
        start, self._inode = self._read_bytes if is_same else 0, there.st_ino
        content = self._read(start)
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes = start + len(whole)
        begun = [one for one in _lines(whole) if one.query is not None]
        others = [_begun(one) for one in begun if one.id not in self._own]
        self._own.difference_update([one.id for one in begun])
        return others

    def _read(self, start: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            self._warn(error)
            return b""

    def _append(self, line: _Line) -> None:
        try:
            append_line(self._path, msgspec.json.encode(line))
            self._is_synced = False
            if not self._num_open and self._path.stat().st_size > _MOST_BYTES:
                self._start_anew()
        except OSError as error:
            self._warn(error)

    def _start_anew(self) -> None:
        """Unless others have begun what they have not finished."""
        try:
            if not _unfinished(self._read(0)):
                self._path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("purges are not written down, so a crash can interrupt one: %s", error)


def _lines(content: bytes) -> Iterator[_Line]:
    for line in content.splitlines():
        try:
            one = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError:
            continue  # cut off when the process was killed: its purge had not begun
        if one.v in _READABLE:
            yield one


def _begun(line: _Line) -> Unfinished:
    assert line.query is not None
    before = line.query.created_before
    at = line.at if before is None else min(before, line.at)
    return Unfinished(line.id, replace(line.query, created_before=at))


def _unfinished(content: bytes) -> dict[str, Unfinished]:
    """By their names, the oldest first."""
    begun: dict[str, Unfinished] = {}
    for one in _lines(content):
        if one.done:
            begun.pop(one.id, None)
        elif one.query is not None:
            begun[one.id] = _begun(one)
        elif one.id in begun:
            for name, keys in one.left.items():
                begun[one.id].left.setdefault(name, []).extend(map(StoredKey, keys))
    return begun
