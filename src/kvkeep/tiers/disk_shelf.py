"""The files of a folder and all books about them, changed together.

The files are the truth. The catalog mirrors them in memory, the ledger counts their bytes for all processes,
the journal takes changes to the index. Another process may add and remove files at any time: the journal
tells of them within a fraction of a second, and until then what the mirror does not know is adopted when it
is met, and what it knows in vain is forgotten. The bound holds for all of them together at all times.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from threading import Lock

from kvkeep.policies import EvictionPolicy
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Presence, PutOutcome
from kvkeep.tiers.catalog import Evicted
from kvkeep.tiers.disk_books import Books
from kvkeep.tiers.disk_files import Detached, ObjectFiles
from kvkeep.tiers.disk_form import FileForm, file_bytes, taken_bytes, whole_blocks
from kvkeep.tiers.disk_index import Row
from kvkeep.tiers.disk_removed import Removed, counted_bytes

__all__ = ["Room", "Shelf"]

_LOGGER = logging.getLogger(__name__)
# What is put aside for people to look at may take this part of the capacity beside it.
_QUARANTINE_SHARE = 16
# Before the key of a copy in flight: makes it longer than any key that a file can have.
_COPY = bytes(128)


@dataclass(frozen=True, slots=True)
class Room:
    """Leave to write a file at `path`; ends with `land`, `replace` or `abandon`. `key` is in flight."""

    key: StoredKey
    num_bytes: int
    labels: bytes
    taken_bytes: int
    path: str


class Shelf:
    """Objects of one folder. Thread-safe; raises OSError when the medium fails, with all books in order."""

    def __init__(
        self,
        folder: str,
        capacity_bytes: int,
        policy: EvictionPolicy[StoredKey],
        *,
        is_durable: bool,
    ) -> None:
        self.files = ObjectFiles(folder, is_durable=is_durable)
        self._books = Books(folder, capacity_bytes, policy)
        self.catalog = self._books.catalog
        self.ledger = self._books.ledger
        self.journal = self._books.journal
        self.is_scan_due = True
        self.num_quarantined = 0
        self.delete_error: OSError | None = None
        # Files get and lose their names under it, so that a delete is final. Taken before all others.
        self._lock = Lock()
        self._enter_lock = Lock()
        # What could not be removed, and what the ledger counts for it.
        self._undeletable: dict[StoredKey, int] = {}
        self._surplus: list[StoredKey] = []
        self._numbers = count()

    # ------------------------------------------------------------------------- open and close

    def load(self) -> dict[StoredKey, int]:
        """Enter into the catalog what the index has, without a look at the files; the stamp of each."""
        with suppress(OSError):  # `enter` will tell
            self.files.make_folders()
        rows = self.journal.open()
        for row in rows:
            admission = self.catalog.restore(row.key, row.num_bytes, row.labels)
            if admission is None:
                self._surplus.append(row.key)
            else:
                self._surplus += [item.key for item in admission.evicted]
        return {row.key: row.stamp for row in rows}

    def enter(self) -> None:
        """Make folders and enter the ledger, or do so again when they have vanished."""
        with self._enter_lock:
            self.files.make_folders()
            if self.ledger.is_current():
                return
            self.is_scan_due = True
            is_alone = self.ledger.open()
            self.delete(self._surplus)
            self._surplus.clear()
            if is_alone:
                self.ledger.count_all(self.catalog.complete_bytes)

    def close(self) -> None:
        """Write what is not in the index yet, and leave the folder."""
        with suppress(OSError):
            self.sync()
        self.journal.close()
        self.ledger.close()

    # ------------------------------------------------------------------------------- writing

    def begin(self, key: StoredKey, num_bytes: int, labels: bytes) -> Room | PutOutcome:
        """Take room for a new object, removing what is evicted; or why not: PRESENT or REFUSED."""
        if key in self._undeletable:
            self.delete([key])
        if not self.ledger.was_alone and self.files.exists(key):
            # Found out later too, but then it would be written before.
            self.adopt(key)
        return self._take_room(key, num_bytes, labels)

    def relabel(self, key: StoredKey, num_bytes: int, labels: bytes) -> bool:
        """Write other labels into an object's file, if they fit there; False: it takes a copy, or is gone."""
        with self._lock:
            if self._books.known_bytes(key) != taken_bytes(num_bytes, len(labels)):
                return False
            try:
                stamp = self.files.relabel(key, num_bytes, labels)
            except FileNotFoundError:
                return False
            if stamp is None:
                return False
            self.catalog.relabel(key, labels)
            self.journal.note(Row(key, num_bytes, labels, stamp, stamp))
            return True

    def begin_copy(self, key: StoredKey, num_bytes: int, labels: bytes) -> Room | PutOutcome:
        """Take room for a copy of an object with other labels, as `begin`."""
        number = next(self._numbers).to_bytes(8, "little")
        return self._take_room(StoredKey(_COPY + number + key), num_bytes, labels)

    def land(self, room: Room, stamp: int) -> PutOutcome:
        """Make the file of a room the object: STORED, or PRESENT where another process was first."""
        key = room.key
        with self._lock:
            if self.catalog.find([key]) != [Presence.IN_FLIGHT]:
                # Stored, and deleted by somebody else meanwhile.
                self.abandon(room)
                return PutOutcome.STORED
            try:
                self.ledger.land(room.taken_bytes, partial(self.files.claim, room.path, key))
            except FileExistsError:
                self.abandon(room)
            else:
                self.catalog.commit(key)
                self.journal.note(Row(key, room.num_bytes, room.labels, stamp, stamp))
                return PutOutcome.STORED
        with suppress(OSError):
            self.adopt(key)
        return PutOutcome.PRESENT

    def replace(self, key: StoredKey, room: Room, stamp: int) -> bool:
        """Make the file of a room, a copy with other labels, that of `key`; False where that is gone.

        The caller reads `key` meanwhile.
        """
        with self._lock:
            if self.catalog.find([key]) != [Presence.PRESENT]:
                self.abandon(room)
                return False
            try:
                old_bytes = self.ledger.land(
                    room.taken_bytes, partial(self.files.exchange, room.path, key)
                )
            except FileNotFoundError:
                self.abandon(room)
                return False
            is_done = self.catalog.relabel(key, room.labels, scratch=room.key)
            assert is_done, "the scratch object had the room"
            self.journal.note(Row(key, room.num_bytes, room.labels, stamp, stamp))
            self.ledger.add(-whole_blocks(old_bytes))
            return True

    def abandon(self, room: Room) -> None:
        """Give a room back, of which nothing is visible; does not fail."""
        with suppress(OSError):
            Path(room.path).unlink(missing_ok=True)
        self.ledger.give_up(room.taken_bytes)
        self.catalog.abort(room.key)

    # ------------------------------------------------------------------------------ removing

    def delete(self, keys: Sequence[StoredKey]) -> int:
        """Remove objects, also ones that only another process knows of; how many there were.

        What cannot be removed is not found any more, counts, and is tried again by `delete_rest`.
        """
        num_deleted = 0
        self.delete_error = None
        with self._removing() as removed:
            for key in keys:
                known_bytes = self._books.known_bytes(key) or self._undeletable.get(key, 0)
                file = None
                is_known = self.catalog.delete([key]) > 0
                try:
                    file = self.files.detach(key)
                    self._undeletable.pop(key, None)
                    self._count_removed(file, known_bytes, removed)
                except OSError as error:
                    self._undeletable[key] = known_bytes
                    self.delete_error = error
                if is_known or file is not None:
                    num_deleted += 1
                    self.journal.note_gone(key)
        return num_deleted

    def delete_rest(self) -> None:
        """Try again to remove what could not be."""
        if self._undeletable:
            self.delete(list(self._undeletable))

    def put_aside(self, key: StoredKey) -> bool:
        """Move a wrong object into quarantine; whether there was one."""
        with self._lock:
            known_bytes = self._books.known_bytes(key)
            self.catalog.delete([key])
            self.journal.note_gone(key)
            try:
                most_bytes = self.catalog.capacity_bytes // _QUARANTINE_SHARE
                num_bytes = self.files.put_aside(key, most_bytes)
            except OSError:
                self._undeletable[key] = known_bytes
                raise
        if num_bytes is None:
            self._books.count_if_alone(-known_bytes)
            return False
        self.num_quarantined += 1
        self.ledger.add(-self._books.counted_bytes(known_bytes, num_bytes))
        return True

    # ------------------------------------------------------- what the mirror did not know

    def adopt(self, key: StoredKey) -> bool:
        """Enter a file that the mirror does not know; whether there is one, and it is whole."""
        with self._removing() as removed:
            if key in self._undeletable or self.catalog.find([key]) != [Presence.ABSENT]:
                return False
            try:
                form = self.files.form(key)
            except FileNotFoundError:
                return False
            if form is not None:
                return self._enter(key, form, removed)
        self._reject(key)
        return False

    def forget(self, key: StoredKey) -> None:
        """Take out of the books an object whose file is gone."""
        with self._lock:
            known_bytes = self._books.known_bytes(key)
            if known_bytes and not self.files.exists(key):
                self.catalog.delete([key])
                self.journal.note_gone(key)
                self._books.count_if_alone(-known_bytes)

    def recheck(self, key: StoredKey) -> FileForm | None:
        """Make the books say what the file says of itself; None where it is gone, or wrong and put aside."""
        with self._removing() as removed:
            if self._books.known_form(key) is None:
                return None
            try:
                form = self.files.form(key)
            except FileNotFoundError:
                return None
            if form is not None:
                known_bytes = self._books.known_bytes(key)
                if self._books.correct(key, form.num_bytes, form.labels):
                    self._books.count_if_alone(self._books.known_bytes(key) - known_bytes)
                    self._books.note(key, form)
                else:
                    self.catalog.delete([key])
                    self._books.count_if_alone(-known_bytes)
                    self._enter(key, form, removed)
                return form
        self._reject(key)
        return None

    def sync(self) -> None:
        """Write to the index what is due, and learn what other processes wrote there."""
        changes = self.journal.sync(keep_gone=self._books.num_others > 0)
        for row in changes.rows:
            self._learn(row)
        for key in changes.gone:
            self.forget(key)

    # -------------------------------------------------------------------------------- inside

    def _take_room(self, key: StoredKey, num_bytes: int, labels: bytes) -> Room | PutOutcome:
        taken = taken_bytes(num_bytes, len(labels))
        path = f"{self.ledger.partial}/{next(self._numbers)}"
        admission, removed, has_room = None, Removed(), False
        try:
            with self._lock:
                admission = self.catalog.begin(key, num_bytes, labels)
                if admission is not None:
                    self._detach_or_recycle(admission.evicted, removed, path)
            removed.cut_off(file_bytes(num_bytes, len(labels)))
            has_room = admission is not None and self._reserve(taken, removed)
        finally:
            if admission is not None and not has_room:
                removed.drop()
                self.ledger.add(-removed.end())
                self.catalog.abort(key)
        if has_room:
            return Room(key, num_bytes, labels, taken, path)
        is_absent = self.catalog.find([key]) == [Presence.ABSENT]
        return PutOutcome.REFUSED if is_absent else PutOutcome.PRESENT

    def _detach_or_recycle(self, evicted: Sequence[Evicted], removed: Removed, path: str) -> None:
        """As `_detach`; the first file becomes `path`, if no other process can have it open."""
        rest = evicted
        try:
            if evicted and self.ledger.was_alone and removed.recycle(self.files, evicted[0], path):
                self.journal.note_gone(evicted[0].key)
                rest = evicted[1:]
        except OSError:
            self.is_scan_due = True
            raise
        self._detach(rest, removed)

    def _learn(self, row: Row) -> None:
        with self._removing() as removed:
            if self._books.correct(row.key, row.num_bytes, row.labels):
                return
            if self.catalog.find([row.key]) == [Presence.PRESENT]:
                self.catalog.delete([row.key])
            if row.key not in self._undeletable:
                admission = self.catalog.restore(row.key, row.num_bytes, row.labels)
                if admission is not None:
                    self._detach(admission.evicted, removed)

    def _enter(self, key: StoredKey, form: FileForm, removed: Removed) -> bool:
        """Enter a whole file into the books; the lock is held."""
        admission = self.catalog.restore(key, form.num_bytes, form.labels)
        if admission is None:
            return False
        self._books.count_if_alone(taken_bytes(form.num_bytes, len(form.labels)))
        self._books.note(key, form)
        with suppress(OSError):  # adopted all the same
            self._detach(admission.evicted, removed)
        return True

    def _reject(self, key: StoredKey) -> None:
        """Put a file aside that is not whole; where that cannot be done it is not looked at any more."""
        _LOGGER.warning("%s is not a whole object", self.files.path(key))
        with suppress(OSError):
            self.put_aside(key)

    @contextmanager
    def _removing(self) -> Iterator[Removed]:
        """The lock; files that are detached in the block are closed, and taken off, behind it."""
        removed = Removed()
        try:
            with self._lock:
                yield removed
        finally:
            if num_bytes := removed.end():
                self.ledger.add(-num_bytes)

    def _detach(self, evicted: Sequence[Evicted], removed: Removed) -> None:
        for item in evicted:
            try:
                file = self.files.detach(item.key)
            except OSError:
                # Out of the mirror, and still there.
                self.is_scan_due = True
                raise
            self.journal.note_gone(item.key)
            self._count_removed(file, counted_bytes(item), removed)

    def _count_removed(self, file: Detached | None, known_bytes: int, removed: Removed) -> None:
        """Take a file off that was detached, or what was counted for one that was gone before."""
        if file is not None:
            removed.add(file, self._books.counted_bytes(known_bytes, file.num_bytes))
        else:
            self._books.count_if_alone(-known_bytes)

    def _reserve(self, num_bytes: int, removed: Removed) -> bool:
        """Take bytes from all processes' common capacity, evicting more where the mirror lags behind."""
        capacity_bytes = self.catalog.capacity_bytes
        while missing := self.ledger.reserve(num_bytes, capacity_bytes, freed_bytes=removed.end()):
            with self._lock:
                evicted = self.catalog.evict(missing).evicted
                self._detach(evicted, removed)
            if not evicted:
                return False
        return True
