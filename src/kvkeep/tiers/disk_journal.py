"""Changes of a folder's books on their way to its index: collected at once, written in batches.

Nothing that reads or writes objects waits for the index, or fails with it: without one, files are scanned.
"""

import logging
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import monotonic, time_ns

from kvkeep.spec import StoredKey
from kvkeep.tiers.disk_index import Batch, Changes, DiskIndex, Row, is_damage

__all__ = ["Journal"]

_LOGGER = logging.getLogger(__name__)
_RETRY_S = 5.0
_MOST_TRIES = 3
_MOST_NOTED = 1 << 20


class Journal:
    """What is not in the index yet, and the index. Any thread may note; `sync` writes.

    `everything` gives all rows, for an index that has to be made anew while objects are served. Errors of the
    index are logged, once until it works again, and what could not be written is kept.
    """

    def __init__(self, folder: str, everything: Callable[[], Iterable[Row]]) -> None:
        self._path = Path(folder) / "index.sqlite"
        self._everything = everything
        self._index: DiskIndex | None = None
        # Guards the two dicts; `_sync_lock`, taken first, guards the index.
        self._lock = Lock()
        self._rows: dict[StoredKey, Row | None] = {}
        self._used: dict[StoredKey, int] = {}
        self._sync_lock = Lock()
        self._is_failing = self._is_lost = False
        self._retry_at = 0.0

    def open(self) -> list[Row]:
        """The objects of the index, the longest unused first; none where it is lost, and made anew."""
        with self._sync_lock:
            for _ in range(_MOST_TRIES):
                try:
                    self._index = DiskIndex(self._path)
                    return self._index.rows()
                except (sqlite3.Error, OSError) as error:
                    self._failed(error)
        return []

    def note(self, row: Row) -> None:
        """There is an object, or it has changed."""
        self._note(row.key, row)

    def note_gone(self, key: StoredKey) -> None:
        """An object is gone."""
        self._note(key, None)

    def _note(self, key: StoredKey, row: Row | None) -> None:
        with self._lock:
            self._rows[key] = row
            self._used.pop(key, None)
            if len(self._rows) > _MOST_NOTED:
                # The index has not worked for long: it is made anew when it does.
                self._rows.clear()
                self._is_lost = True

    def note_used(self, keys: Iterable[StoredKey]) -> None:
        """Objects were used now."""
        now = time_ns()
        with self._lock:
            for key in keys:
                self._used[key] = now

    def sync(self, *, keep_gone: bool) -> Changes:
        """Write what was noted; returns what other processes changed since the last call."""
        with self._sync_lock:
            if not self._is_open():
                return Changes()
            assert self._index is not None
            batch = self._take()
            try:
                if batch.rows or batch.used:
                    changes = self._index.write(batch, keep_gone=keep_gone)
                else:
                    changes = self._index.changes()
            except (sqlite3.Error, OSError) as error:
                self._put_back(batch)
                self._failed(error)
                return Changes()
            if self._is_failing:
                _LOGGER.info("%s: the index works again", self._path)
                self._is_failing = False
            return changes

    def close(self) -> None:
        """Close the index; calling it again does nothing."""
        with self._sync_lock:
            self._close_index()
            self._retry_at = float("inf")

    def _is_open(self) -> bool:
        """Whether there is an index, opened anew if its file is gone or it failed a while ago."""
        if self._index is not None and self._index.is_current() and not self._is_lost:
            return True
        if monotonic() < self._retry_at:
            return False
        self._close_index()
        try:
            if self._is_lost:
                DiskIndex.remove(self._path)
                self._is_lost = False
            self._index = DiskIndex(self._path)
        except (sqlite3.Error, OSError) as error:
            self._failed(error)
            return False
        rows: dict[StoredKey, Row | None] = {row.key: row for row in self._everything()}
        with self._lock:
            self._rows = {**rows, **self._rows}
        return True

    def _take(self) -> Batch:
        with self._lock:
            batch = Batch(self._rows, self._used)
            self._rows, self._used = {}, {}
        return batch

    def _put_back(self, batch: Batch) -> None:
        """Under what was noted since."""
        with self._lock:
            self._rows = {**batch.rows, **self._rows}
            used = {key: at for key, at in batch.used.items() if key not in self._rows}
            self._used = {**used, **self._used}

    def _failed(self, error: sqlite3.Error | OSError) -> None:
        self._close_index()
        self._retry_at = monotonic() + _RETRY_S
        if isinstance(error, sqlite3.Error) and is_damage(error):
            _LOGGER.warning("%s: damaged (%s), made anew from the files", self._path, error)
            with suppress(OSError):
                DiskIndex.remove(self._path)
        elif not self._is_failing:
            self._is_failing = True
            # Whoever writes objects to the same disk warns, if it is the disk.
            _LOGGER.info("%s: %s; objects are served without it", self._path, error)

    def _close_index(self) -> None:
        if self._index is not None:
            try:
                self._index.close()
            except sqlite3.Error:
                _LOGGER.debug("%s: not closed in good order", self._path, exc_info=True)
            self._index = None
