"""What local tiers that outlive the process say of their blocks, read at the start beside everything else.

Until all of it is known a block is judged by the labels that come with it. Purges that a crash has cut short
come to their end first.
"""

from collections.abc import Sequence
from functools import partial
from logging import getLogger
from pathlib import Path
from threading import Event
from typing import Protocol, runtime_checkable

from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import Lifetimes
from kvkeep.cache.lifetimes.journal import PurgeJournal
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Labelled, Tier
from kvkeep.tiers.lanes import Lane

__all__ = ["Restoring", "open_journal"]

_log = getLogger(__name__)
_BATCH = 1024


@runtime_checkable
class _HasFolder(Protocol):
    folder: Path


@runtime_checkable
class _Wraps(Protocol):
    inner: Tier


def open_journal(below: Hierarchy | None) -> PurgeJournal | None:
    """The journal of purges beside the first persistent tier of this machine, None without one."""
    for tier in () if below is None else below.stack.tiers:
        inner = tier
        while isinstance(inner, _Wraps):
            inner = inner.inner
        can = inner.capabilities
        if can.is_local and can.is_persistent and isinstance(inner, _HasFolder):
            return PurgeJournal(Path(inner.folder))
    return None


class Restoring:
    """Reads labels on a thread of its own; the register gets them in `Hierarchy.poll`.

    With `ends_purges` what purges mean that go on is deleted; otherwise it is left to them, who count it.
    """

    def __init__(self, lifetimes: Lifetimes, below: Hierarchy, *, ends_purges: bool) -> None:
        self._ends_purges = ends_purges
        self._lifetimes = lifetimes
        self._below = below
        self._tiers = [
            (at, tier)
            for at, tier in enumerate(below.stack.tiers)
            if tier.capabilities.is_local
            and tier.capabilities.is_persistent
            and tier.capabilities.keeps_labels
        ]
        self._lane = Lane("labels", num_threads=1, max_jobs=1)
        self._is_closing = Event()
        self.is_done = not self._tiers
        if self._tiers:
            self._lane.submit(self._work)

    def wait(self) -> None:
        """Wait until all labels are known."""
        while not self.is_done:
            self._below.wait(1.0)
            self._below.poll(is_busy=False)

    def close(self) -> None:
        """End the thread."""
        self._is_closing.set()
        self._lane.close()

    def _work(self) -> None:
        try:
            for at, tier in self._tiers:
                batch: list[Labelled] = []
                for one in tier.labelled():
                    batch.append(one)
                    if len(batch) == _BATCH:
                        self._below.hand_over(partial(self._take, at, batch))
                        batch = []
                    if self._is_closing.is_set():
                        break
                self._below.hand_over(partial(self._take, at, batch))
        except Exception:  # noqa: BLE001
            # A tier of somebody else's may raise anything; its blocks are judged when they come.
            _log.exception("the labels of a tier cannot be read")
        finally:
            self._below.hand_over(self._finish)

    def _take(self, at: int, batch: Sequence[Labelled]) -> None:
        """On the owner's thread."""
        dead = []
        register, relabels = self._lifetimes.register, self._below.relabels
        for stored, _, labels in batch:
            key = BlockKey(stored[:-1])
            if self._below.deletions.is_doomed(stored):
                continue
            if not self._ends_purges and self._lifetimes.is_being_purged(key, labels):
                continue
            if not self._lifetimes.restore(key, labels):
                dead.append(stored)
            elif key in register:
                relabels.note(key, labels, at)
                pinned = register.get(key)
                if pinned is not None and pinned.pins:
                    self._below.holds.hold((key,))
        if dead:
            self._below.begin_delete(dead)

    def _finish(self) -> None:
        self.is_done = True
        self._lifetimes.sessions.end_restoring()
