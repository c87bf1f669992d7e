"""Purges that have begun, on a disk, so that a crash in the middle is made good at the next start.

One line of JSON for each purge that begins, `{"v": 2, "id": ..., "at": ..., "query": {...}, "tiers": [...]}`
with the tiers that it looks through, and one for each that is finished, `{"v": 2, "id": ..., "done": true}`.
Between them may be `{"v": 2, "id": ..., "left": {"tier": [...]}}`, objects of which a tier that did not
answer has yet to hear: what it says of them itself may be old. A purge that is repeated does no harm: it
means nothing that was created after it began, and of versions not the one that a later line brings, which
older blocks may bear since. Several processes may write to one journal, and each reads what the others begin;
one with tiers that another's purge does not reach goes on with it there (`"of": ...`).

A line survives this process when `begin` returns, and a failure of power once `sync` was called, which waits
for the medium and comes before anything is deleted.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from logging import getLogger
from pathlib import Path
from threading import Lock
from uuid import uuid4

import msgspec

from kvkeep.cache.lifetimes.appended_line import FollowedFile, append_line, replace_content
from kvkeep.cache.lifetimes.selector import Query
from kvkeep.spec import BlockKey, StoredKey

__all__ = ["PurgeJournal", "Unfinished"]

_log = getLogger(__name__)
# A query of version 1 has fewer fields.
_VERSION = 2
_READABLE = (1, 2)
_NAME = "purges.jsonl"
# A journal beyond this is replaced by what of it is unfinished.
_MOST_BYTES = 1 << 16
_MOST_HEARD = 4096


class _Line(msgspec.Struct, frozen=True, omit_defaults=True):
    v: int
    id: str
    at: float = 0.0
    query: Query | None = None
    done: bool = False
    left: dict[str, list[bytes]] = {}
    tiers: list[str] = []
    of: str = ""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A purge that was begun, and may not have come to its end.

    `tiers` are those that it looks through, if they were written down; `origin_id` is the purge that it
    goes on with, or itself.
    """

    purge_id: str
    query: Query
    # By the names of tiers.
    left: dict[str, list[StoredKey]] = field(default_factory=dict)
    tiers: frozenset[str] = frozenset()
    origin_id: str = ""

    def is_within(self, names: Collection[str]) -> bool:
        """Whether a process with these tiers can bring it to its end."""
        return self.tiers.union(self.left).issubset(names)


class PurgeJournal:
    """The journal in a folder. A medium that fails costs the journal, not the purge: there is one warning."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _NAME
        self._file = FollowedFile(self._path)
        self._has_warned = False
        # Purges of this process, and those of others that it knows, the oldest first.
        self._heard: dict[str, None] = {}
        self._shorten_at = _MOST_BYTES
        self._is_synced = True
        self._syncing = Lock()

    def begin(
        self,
        query: Query,
        now_s: float,
        *,
        tiers: Collection[str] = (),
        origin: Unfinished | None = None,
    ) -> str:
        """Write down, before it begins, what is to be purged, and in which tiers; returns its name.

        It may go on with another's purge, of which `origin` tells.
        """
        purge_id, of = uuid4().hex, "" if origin is None else origin.origin_id
        self._hear(purge_id)
        line = _Line(_VERSION, purge_id, at=now_s, query=query, tiers=sorted(tiers), of=of)
        self._append(line)
        return purge_id

    def leave(self, purge_id: str, name: str, keys: Sequence[StoredKey]) -> None:
        """A tier has yet to hear of these."""
        self._append(_Line(_VERSION, purge_id, left={name: list(keys)}))

    def finish(self, purge_id: str) -> None:
        """All of it is gone."""
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
        lines = _renewed(_lines(self._read_on()))
        for one in lines:
            self._hear(one.of or one.id)
        return list(_unfinished(lines).values())

    def begun_by_others(self) -> list[Unfinished]:
        """What other processes have begun since the last call, or since `unfinished`; cheap when nothing."""
        others = []
        for one in _renewed(_lines(self._read_on())):
            if one.query is not None and (one.of or one.id) not in self._heard:
                self._hear(one.of or one.id)
                others.append(_begun(one))
        return others

    def close(self) -> None:
        """Read no more of what others begin."""
        self._file.close()

    def _hear(self, purge_id: str) -> None:
        self._heard[purge_id] = None
        if len(self._heard) > _MOST_HEARD:
            del self._heard[next(iter(self._heard))]

    def _read_on(self) -> bytes:
        try:
            return self._file.read_on()
        except OSError as error:
            self._warn(error)
            return b""

    def _append(self, line: _Line) -> None:
        try:
            append_line(self._path, msgspec.json.encode(line))
            self._is_synced = False
            if self._path.stat().st_size > self._shorten_at:
                num_bytes = replace_content(self._path, _shortened)
                self._shorten_at = max(_MOST_BYTES, 2 * num_bytes)
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


def _renewed(lines: Iterable[_Line]) -> list[_Line]:
    """The same lines; of names whose versions several purges bring, only those of the last one hold."""
    renewed: list[_Line] = []
    newest: dict[frozenset[BlockKey] | None, Query] = {}
    for line in reversed(list(lines)):
        if line.query is None or not line.query.versions:
            renewed.append(line)
            continue
        later = newest.get(line.query.namespaces, line.query)
        query = line.query.renewed(later)
        newest[query.namespaces] = replace(later, versions=later.versions | query.versions)
        renewed.append(msgspec.structs.replace(line, query=query))
    return renewed[::-1]


def _begun(line: _Line) -> Unfinished:
    assert line.query is not None
    before = line.query.created_before
    at = line.at if before is None else min(before, line.at)
    query = replace(line.query, created_before=at)
    return Unfinished(line.id, query, tiers=frozenset(line.tiers), origin_id=line.of or line.id)


def _unfinished(lines: Iterable[_Line]) -> dict[str, Unfinished]:
    """By their names, the oldest first."""
    begun: dict[str, Unfinished] = {}
    for one in lines:
        if one.done:
            begun.pop(one.id, None)
        elif one.query is not None:
            begun[one.id] = _begun(one)
        elif one.id in begun:
            for name, keys in one.left.items():
                begun[one.id].left.setdefault(name, []).extend(map(StoredKey, keys))
    return begun


def _shortened(content: bytes) -> bytes:
    """The lines of purges that are not finished."""
    lines = _renewed(_lines(content))
    begun = _unfinished(lines)
    return b"".join(msgspec.json.encode(one) + b"\n" for one in lines if one.id in begun)
