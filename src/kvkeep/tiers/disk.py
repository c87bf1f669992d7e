"""A local disk below the device: a file an object, an index beside them, safe to kill at any instant.

folder/objects/ab/ab34...   one object each: see disk_form
folder/partial/<token>/     files that a living process is writing
folder/quarantine/          the newest of those that were wrong, for people to look at
folder/index.sqlite, ledger the books: see disk_index and disk_ledger
"""

import errno
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic

from kvkeep.errors import ConfigError, TierError
from kvkeep.policies import EvictionPolicy, make_policy
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import (
    Capabilities,
    Got,
    Labelled,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    RankOf,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.disk_keeper import Keeper
from kvkeep.tiers.disk_scan import ScanReport, scan
from kvkeep.tiers.disk_shelf import Shelf
from kvkeep.tiers.disk_switch import Switch
from kvkeep.tiers.tally import Tally

__all__ = ["DiskTier"]

_LOGGER = logging.getLogger(__name__)
# A file that holds nothing yet takes a block.
LEAST_CAPACITY = 4096
# Who asks for all labels waits so long, at most, for the first look at all files.
_SCAN_WAIT_S, _SCAN_STEP_S = 60.0, 0.1


class DiskTier(Tier):
    """Objects as files below `folder`, which take at most `capacity_bytes` of the disk, in blocks of 4096.

    It serves from its index at once and compares that with the files in the background. Several processes may
    share a folder: the capacity then holds for all of them together (the smallest, where theirs differ),
    and each learns of the others' objects within a fraction of a second, of one that it is to get at once.
    `durable` makes every put survive a power cut, at the price of waiting for the disk; without it what a
    power cut leaves unfinished is found out by its form or its checksum, and is a miss.

    When the disk is full, read-only, failing or gone, puts fail and gets miss; there is one warning, and a
    new try every `retry_s`. Beside the capacity, `folder/quarantine` may take a sixteenth of it. `policy` is
    a name or a policy of its own. Raises ConfigError for settings that cannot be.
    """

    capabilities = Capabilities(
        is_local=True, is_persistent=True, is_shared=False, keeps_labels=True
    )

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        policy: str | EvictionPolicy[StoredKey] = "lru",
        durable: bool = False,
        name: str = "disk",
        retry_s: float = 5.0,
    ) -> None:
        path = Path(folder).expanduser().absolute()
        if capacity_bytes < LEAST_CAPACITY:
            raise ConfigError(
                f"capacity_bytes={capacity_bytes!r} holds no file; give at least {LEAST_CAPACITY}"
            )
        if path.exists() and not path.is_dir():
            raise ConfigError(f"folder={str(folder)!r} is a file; give the path of a folder")
        if isinstance(policy, str):
            policy = make_policy(policy, by_content=True)
        self.name = name
        self.folder = path
        self._shelf = Shelf(str(path), capacity_bytes, policy, is_durable=durable)
        self._catalog = self._shelf.catalog
        self._tally = Tally()
        self._writes = Switch(f"writing to {path}", retry_s)
        self._reads = Switch(f"reading from {path}", retry_s)
        self._is_open = True
        self._num_unreached = 0
        stamps = self._shelf.load()
        try:
            self._shelf.enter()
        except OSError as error:
            self._writes.failed(error)
        self._keeper = Keeper(self._shelf, name, stamps, retry_s)

    @property
    def capacity_bytes(self) -> int:
        return self._catalog.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._catalog.used_bytes

    @property
    def num_outages(self) -> int:
        """How often reading or writing was switched off because the disk failed."""
        return self._reads.num_outages + self._writes.num_outages

    @property
    def num_quarantined(self) -> int:
        """How many wrong objects were put aside."""
        return self._shelf.num_quarantined

    def find(self, keys: Sequence[StoredKey]) -> list[Presence]:
        if not self._is_open or self._reads.is_off:
            return [Presence.ABSENT] * len(keys)
        return self._catalog.find(keys)

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        if not self._is_open or self._reads.is_off:
            return self._tally.miss(MissCause.UNAVAILABLE, "closed, or switched off after failing")
        num_bytes = self._acquire(key)
        if num_bytes is None:
            return self._tally.miss(MissCause.ABSENT)
        try:
            got = self._read(key, buffers, num_bytes)
        finally:
            self._catalog.release(key)
        if isinstance(got, Got):
            self._reads.worked()
            self._shelf.journal.note_used((key,))
            return got
        if got.cause is MissCause.CORRUPT:
            self.quarantine(key, got.reason)
        elif got.cause is MissCause.ABSENT:
            self._shelf.forget(key)
        return self._tally.miss(got.cause, got.reason)

    def put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes = b""
    ) -> PutOutcome:
        if not self._is_open or self._writes.is_off:
            return self._tally.put(PutOutcome.FAILED)
        source = _Source(parts)
        try:
            outcome = self._put(key, source.parts, num_bytes, labels)
        except OSError as error:
            if error is source.error:
                raise
            self._failed_to_write(error)
            outcome = PutOutcome.FAILED
        return self._tally.put(outcome)

    def delete(self, keys: Sequence[StoredKey]) -> int:
        if not self._is_open:
            return 0
        num_deleted = self._shelf.delete(keys)
        if self._shelf.delete_error is not None:
            self._num_unreached += 1
            self._failed_to_write(self._shelf.delete_error)
        return num_deleted

    @property
    def num_unreached(self) -> int:
        return self._num_unreached

    def objects(self) -> Iterator[StoredObject]:
        return iter(self._catalog.objects() if self._is_open else [])

    def stats(self) -> TierStats:
        return self._tally.stats(self.name, self._catalog)

    def touch(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.touch(keys)
        self._shelf.journal.note_used(
            [key for key in keys if self._catalog.num_bytes(key) is not None]
        )

    def labels(self, key: StoredKey) -> bytes | None:
        if not self._is_open:
            return None
        if not self._keeper.is_scanned:
            # What the index says may be older than what the file says.
            with suppress(OSError):
                self._shelf.recheck(key)
        labels = self._catalog.labels(key)
        if labels is None and self._is_adopted(key):
            labels = self._catalog.labels(key)
        return labels

    def relabel(self, key: StoredKey, labels: bytes) -> bool:
        if not self._is_open or self._writes.is_off:
            return False
        num_bytes = self._acquire(key)
        if num_bytes is None:
            return False
        try:
            is_done = self._relabel(key, num_bytes, labels)
        except OSError as error:
            is_done = False
            self._failed_to_write(error)
        finally:
            self._catalog.release(key)
        if not is_done:
            self._shelf.forget(key)
        return is_done

    def labelled(self) -> Iterator[Labelled]:
        """Waits until all files have been looked at once: some may be newer than the index."""
        until = monotonic() + _SCAN_WAIT_S
        while self._is_open and not self._is_failing() and monotonic() < until:
            if self._keeper.wait(_SCAN_STEP_S):
                break
        return iter(self._catalog.labelled() if self._is_open else [])

    def hold(self, keys: Sequence[StoredKey]) -> list[bool]:
        """In this process: others that share the folder do not know of it."""
        if not self._is_open:
            return [False] * len(keys)
        for key, presence in zip(keys, self._catalog.find(keys), strict=True):
            if presence is Presence.ABSENT:
                self._is_adopted(key)
        return self._catalog.hold(keys)

    def let_go(self, keys: Sequence[StoredKey]) -> None:
        self._catalog.let_go(keys)

    def rank_by(self, rank_of: RankOf) -> None:
        self._catalog.rank_by(rank_of)

    def quarantine(self, key: StoredKey, reason: str) -> None:
        """Take an object out of use whose bytes are not what they should be; its file is put aside."""
        try:
            if self._is_open and self._shelf.put_aside(key):
                _LOGGER.warning("%s: %s put aside: %s", self.folder, key.hex(), reason)
        except OSError as error:
            self._failed_to_write(error)

    def wait_until_verified(self, timeout_s: float) -> bool:
        """Wait until the books were compared with the files once; False if that takes longer."""
        return self._keeper.wait(timeout_s)

    def verify(self) -> ScanReport:
        """Ask every file whether it is whole and what its labels are, and put the books right.

        Whether the bytes of an object are right its reader knows, who has its checksum. Raises TierError when
        the disk fails.
        """
        report = ScanReport()
        try:
            for _ in scan(self._shelf, {}, report):
                pass
            self._shelf.sync()
        except OSError as error:
            raise TierError(f"{self.folder} cannot be verified: {error}") from error
        return report

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._keeper.close()
            self._shelf.close()

    def _put(
        self, key: StoredKey, parts: Iterable[memoryview], num_bytes: int, labels: bytes
    ) -> PutOutcome:
        if self._writes.is_on_trial:
            self._shelf.enter()
        room = self._shelf.begin(key, num_bytes, labels)
        if isinstance(room, PutOutcome):
            return room
        is_landed = False
        try:
            stamp = self._shelf.files.write(room.path, parts, num_bytes, labels)
            if stamp is None:
                return PutOutcome.FAILED
            outcome = self._shelf.land(room, stamp)
            is_landed = True
        finally:
            if not is_landed:
                self._shelf.abandon(room)
        try:
            self._shelf.files.settle(key)
        except OSError:
            self._shelf.delete([key])
            raise
        self._writes.worked()
        return outcome

    def _relabel(self, key: StoredKey, num_bytes: int, labels: bytes) -> bool:
        """Write other labels into the file, or make it anew with them; whether that was done.

        The caller reads the object.
        """
        if self._writes.is_on_trial:
            self._shelf.enter()
        if not self._shelf.relabel(key, num_bytes, labels):
            return self._copy(key, num_bytes, labels)
        self._shelf.files.settle_labels(key)
        self._writes.worked()
        return True

    def _copy(self, key: StoredKey, num_bytes: int, labels: bytes) -> bool:
        room = self._shelf.begin_copy(key, num_bytes, labels)
        if isinstance(room, PutOutcome):
            return False
        is_landed = False
        try:
            stamp = self._shelf.files.copy(key, room.path, num_bytes, labels)
            if stamp is None:
                return False
            is_done = self._shelf.replace(key, room, stamp)
            is_landed = True
        finally:
            if not is_landed:
                self._shelf.abandon(room)
        self._shelf.files.settle(key)
        self._writes.worked()
        return is_done

    def _acquire(self, key: StoredKey) -> int | None:
        """Begin to read an object, also one that another process put a moment ago."""
        num_bytes = self._catalog.acquire(key)
        if num_bytes is None and self._is_adopted(key):
            num_bytes = self._catalog.acquire(key)
        return num_bytes

    def _is_adopted(self, key: StoredKey) -> bool:
        try:
            return self._shelf.adopt(key)
        except PermissionError:
            return False
        except OSError as error:
            self._reads.failed(error)
            return False

    def _read(self, key: StoredKey, buffers: Sequence[memoryview], num_bytes: int) -> Got | Miss:
        wanted = sum([buffer.nbytes for buffer in buffers])
        if wanted != num_bytes:
            return Miss(MissCause.SHORT, f"{num_bytes} bytes, not {wanted}")
        try:
            labels = self._shelf.files.read(key, buffers, wanted)
        except FileNotFoundError:
            return Miss(MissCause.ABSENT, "its file is gone")
        except PermissionError as error:
            return Miss(MissCause.CORRUPT, str(error))
        except OSError as error:
            self._reads.failed(error)
            if error.errno == errno.EIO:
                # One bad place must not switch reading off again and again.
                with suppress(OSError):
                    self._shelf.put_aside(key)
            return Miss(MissCause.UNAVAILABLE, str(error))
        if labels is None:
            return Miss(MissCause.CORRUPT, "its file is not whole")
        return Got(num_bytes, labels)

    def _is_failing(self) -> bool:
        return self._reads.is_on_trial or self._writes.is_on_trial

    def _failed_to_write(self, error: OSError) -> None:
        if self._is_open:
            self._writes.failed(error)


class _Source:
    """The parts of an object; `error` is what they raised, so that it is not taken for the disk's."""

    def __init__(self, parts: Iterable[memoryview]) -> None:
        self.error: BaseException | None = None
        self.parts = parts if isinstance(parts, list | tuple) else self._watched(parts)

    def _watched(self, parts: Iterable[memoryview]) -> Iterator[memoryview]:
        try:
            yield from parts
        except BaseException as error:
            self.error = error
            raise
