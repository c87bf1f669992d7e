"""What a disk tier does beside its calls, on a thread of its own: index, first scan, what others left."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import Event, Thread
from time import monotonic

from kvkeep.spec import StoredKey
from kvkeep.tiers.disk_scan import ScanReport, scan
from kvkeep.tiers.disk_shelf import Shelf

__all__ = ["Keeper"]

_LOGGER = logging.getLogger(__name__)
_INTERVAL_S = 0.1
# Between two steps of a scan, so that it takes a part of a core only.
_STEP_PAUSE_S = 1e-3


class Keeper:
    """Keeps a shelf's books until it is closed. What fails is tried again after `retry_s`.

    `stamps` are those of the index, for the first scan.
    """

    def __init__(
        self, shelf: Shelf, name: str, stamps: Mapping[StoredKey, int], retry_s: float
    ) -> None:
        self._shelf = shelf
        self._retry_s = retry_s
        self._stamps = stamps
        self._is_closing = Event()
        self._is_scanned = Event()
        self._is_awaited = False
        self._thread = Thread(target=self._run, name=f"kvkeep-{name}", daemon=True)
        self._thread.start()

    @property
    def is_scanned(self) -> bool:
        """Whether the books have been compared with the files since the start."""
        return self._is_scanned.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the first scan, which hurries then; False if it takes longer."""
        self._is_awaited = True
        return self._is_scanned.wait(timeout_s)

    def close(self) -> None:
        """End the thread; calling it again does nothing."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        steps: Iterator[None] | None = None
        sync_at = scan_at = sweep_at = 0.0
        while not self._is_closing.wait(self._pause_s(is_scanning=steps is not None)):
            now = monotonic()
            if steps is None and self._shelf.is_scan_due and now >= scan_at:
                steps, scan_at = self._scan(), now + self._retry_s
            if steps is not None and not _is_done(partial(_step, steps)):
                steps = None
            if now >= sync_at:
                sync_at = now + _INTERVAL_S
                _is_done(self._shelf.sync)
            if now >= sweep_at:
                sweep_at = now + self._retry_s
                _is_done(self._sweep)

    def _pause_s(self, *, is_scanning: bool) -> float:
        if is_scanning and self._is_awaited and not self.is_scanned:
            return 0.0
        return _STEP_PAUSE_S if is_scanning else _INTERVAL_S

    def _scan(self) -> Iterator[None]:
        self._shelf.is_scan_due = False
        stamps, self._stamps = self._stamps, {}
        report = ScanReport()
        try:
            yield from scan(self._shelf, stamps, report)
        except OSError:
            self._shelf.is_scan_due = True
            raise
        if not report.is_clean:
            _LOGGER.info("the index was not what the files say: %s", report)
        self._is_scanned.set()

    def _sweep(self) -> None:
        """Remove what dead processes left behind, and what could not be removed before."""
        self._shelf.delete_rest()
        if not self._shelf.ledger.is_current():
            self._shelf.enter()
        elif self._shelf.ledger.num_others:
            self._shelf.ledger.sweep()


def _step(steps: Iterator[None]) -> None:
    """Do the next step; raises StopIteration when there is none."""
    next(steps)


def _is_done(chore: Callable[[], None]) -> bool:
    """Do something; whether there was something to do, and the medium did not fail."""
    try:
        chore()
    except StopIteration:
        return False
    except OSError:
        _LOGGER.debug("the medium failed in the background", exc_info=True)
        return False
    return True
