"""The index of a folder of objects: what a start would otherwise read from every file. Raises sqlite3.Error.

SQLite in WAL mode, synchronous NORMAL: it survives the end of the process at any instant, and a power cut
without its last batches. The files are the truth: an index that is lost, old or damaged costs time only.
"""

import os.path
import sqlite3
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple

from kvkeep.spec import StoredKey
from kvkeep.tiers.disk_form import is_name
from kvkeep.tiers.trailer import labels_crc

__all__ = ["Batch", "Changes", "DiskIndex", "Row", "is_damage"]

_VERSION = 1
_SCHEMA = """
CREATE TABLE objects (
    key BLOB PRIMARY KEY,
    num_bytes INTEGER NOT NULL,
    labels BLOB NOT NULL,
    crc INTEGER NOT NULL,      -- of num_bytes and labels, as in the file
    stamp INTEGER NOT NULL,    -- the file's time of modification, ns
    used_at INTEGER NOT NULL,  -- ns. Of what is gone: when it went
    change INTEGER NOT NULL,   -- number of the batch that changed the row last
    is_gone INTEGER NOT NULL   -- kept a while, for other processes to learn
) WITHOUT ROWID;
CREATE INDEX by_change ON objects (change);
CREATE INDEX gone ON objects (used_at) WHERE is_gone;
CREATE TABLE newest (change INTEGER NOT NULL);
INSERT INTO newest VALUES (0);
"""
_COLUMNS = "key, num_bytes, labels, crc, stamp, used_at"
_UPSERT = f"""
INSERT INTO objects ({_COLUMNS}, change, is_gone) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET num_bytes = excluded.num_bytes, labels = excluded.labels, crc = excluded.crc,
    stamp = excluded.stamp, used_at = excluded.used_at, change = excluded.change, is_gone = excluded.is_gone
"""  # noqa: S608  the columns are those above
_BUSY_S = 5.0
_KEEP_GONE_NS = 300 * 10**9
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_FORMAT", "SQLITE_ERROR", "SQLITE_SCHEMA")


class Row(NamedTuple):
    """An object as the index has it; times are in nanoseconds.

    A NamedTuple because a start makes one for each object, and a frozen dataclass takes far longer.
    """

    key: StoredKey
    num_bytes: int
    labels: bytes
    stamp: int
    used_at: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What is to be written: new or changed rows (None: the object is gone), and last uses of others."""

    rows: Mapping[StoredKey, Row | None] = field(default_factory=dict)
    used: Mapping[StoredKey, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Changes:
    """What other processes changed."""

    rows: tuple[Row, ...] = ()
    gone: tuple[StoredKey, ...] = ()


class _NotOurs(sqlite3.DatabaseError):
    """A whole database that is no index of this version."""


def is_damage(error: sqlite3.Error) -> bool:
    """Whether it says that the index itself is broken, and not the medium or a lock."""
    name = getattr(error, "sqlite_errorname", "")
    return isinstance(error, _NotOurs) or name.startswith(_DAMAGE)


class DiskIndex:
    """An open index; one thread at a time may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(
            path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare()
            self._file = path.stat()
            self._seen = self._newest_change()
            self._data_version = self._pragma("data_version")
        except BaseException:
            self._connection.close()
            raise

    @staticmethod
    def remove(path: Path) -> None:
        """Remove the files of an index that is broken."""
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def is_current(self) -> bool:
        """Whether the file is still where it was opened."""
        with suppress(OSError):
            return os.path.samestat(self._path.stat(), self._file)
        return False

    def rows(self) -> list[Row]:
        """All objects, the longest unused first; rows that are damaged are left out."""
        found = self._connection.execute(
            f"SELECT {_COLUMNS} FROM objects WHERE NOT is_gone ORDER BY used_at"  # noqa: S608
        )
        return _whole(found)

    def write(self, batch: Batch, *, keep_gone: bool) -> Changes:
        """Write a batch, all or nothing; returns what others changed since the last call.

        `keep_gone` leaves word of what is gone for other processes.
        """
        with self._transaction():
            changes, change = self._since(self._seen), self._newest_change() + 1
            self._put(batch.rows, change, keep_gone=keep_gone)
            self._connection.executemany(
                "UPDATE objects SET used_at = ? WHERE key = ? AND NOT is_gone",
                [(used_at, key) for key, used_at in batch.used.items()],
            )
            horizon = time_ns() - (_KEEP_GONE_NS if keep_gone else 0)
            self._connection.execute(
                "DELETE FROM objects WHERE is_gone AND used_at < ?", (horizon,)
            )
            self._connection.execute("UPDATE newest SET change = ?", (change,))
        self._seen = change
        return changes

    def changes(self) -> Changes:
        """What others changed since the last call."""
        data_version = self._pragma("data_version")
        if data_version == self._data_version:
            return Changes()
        # In this order: what is written in between comes twice, and not never.
        newest = self._newest_change()
        changes = self._since(self._seen)
        self._seen, self._data_version = newest, data_version
        return changes

    def close(self) -> None:
        """Close it; the log is written back into the file by the last process."""
        self._connection.close()

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            # Another process may have made it by now.
            if self._pragma("user_version") == 0:
                for statement in _SCHEMA.split(";"):
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version = {_VERSION}")
        if self._pragma("user_version") != _VERSION:
            raise _NotOurs("the index has another version")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _newest_change(self) -> int:
        found = self._connection.execute("SELECT change FROM newest").fetchone()
        if found is None:
            raise _NotOurs("the index does not count its changes")
        return int(found[0])

    def _since(self, change: int) -> Changes:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM objects WHERE change > ? AND NOT is_gone",  # noqa: S608
            (change,),
        )
        gone = self._connection.execute(
            "SELECT key FROM objects WHERE change > ? AND is_gone", (change,)
        )
        return Changes(tuple(_whole(rows)), tuple(StoredKey(key) for (key,) in gone))

    def _put(self, rows: Mapping[StoredKey, Row | None], change: int, *, keep_gone: bool) -> None:
        now = time_ns()
        gone = [key for key, row in rows.items() if row is None]
        written: list[tuple[object, ...]] = [
            (key, row.num_bytes, row.labels, labels_crc(row.num_bytes, row.labels), row.stamp,
             row.used_at, change, 0)
            for key, row in rows.items() if row is not None
        ]  # fmt: skip
        if keep_gone:
            written += [(key, 0, b"", 0, 0, now, change, 1) for key in gone]
        else:
            self._connection.executemany(
                "DELETE FROM objects WHERE key = ?", [(key,) for key in gone]
            )
        self._connection.executemany(_UPSERT, written)


def _whole(rows: Iterable[tuple[Any, ...]]) -> list[Row]:
    """Rows whose numbers and labels are what was written. A damaged file may have anything in them."""
    found = []
    for key, num_bytes, labels, crc, stamp, used_at in rows:
        try:
            is_whole = labels_crc(num_bytes, labels) == crc
        except (TypeError, struct.error):
            continue
        if is_whole and type(key) is bytes and is_name(key):
            found.append(Row(StoredKey(key), num_bytes, labels, stamp, used_at))
    return found
