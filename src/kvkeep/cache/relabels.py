"""Labels of blocks that lie in tiers, written again when they have changed.

What a purge has to find after a crash is written at once: tags, pins, and that a session has ended. A longer
life or one more session is written when there is time, and when the cache is closed: lost, it costs a miss.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from logging import getLogger
from math import inf

from kvkeep.blocks import stored_key
from kvkeep.cache.lifetimes import Change
from kvkeep.spec import BlockKey
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Relabels"]

_log = getLogger(__name__)
_CHUNK = 32
_MOST_JOBS = 4
_CLOSING_S = 60.0
# A change that can wait is written so long after it was made.
_LAZY_S = 30.0


class Relabels:
    """What tiers say of blocks, compared with what is so. Owned by the thread that owns the books."""

    def __init__(
        self,
        stack: TierStack,
        results: Results,
        num_groups: int,
        clock: Callable[[], float],
    ) -> None:
        self._stack = stack
        self._results = results
        self._groups = range(num_groups)
        self._clock = clock
        self._lane = Lane("relabel", num_threads=1, max_jobs=_MOST_JOBS)
        self.labels_of: Callable[[BlockKey], bytes] = _no_labels
        # Only what outlives the process, or is seen by others, has to be told.
        self._is_needed = any(
            tier.capabilities.keeps_labels and tier.capabilities.is_persistent
            for tier in stack.tiers
        )
        self._written: dict[BlockKey, bytes] = {}
        self._urgent: dict[BlockKey, None] = {}
        self._lazy: dict[BlockKey, float] = {}
        self.num_under_way = 0

    @property
    def num_pending(self) -> int:
        """Blocks whose labels are to be written, at once or some time."""
        return len(self._urgent) + len(self._lazy)

    def note(self, key: BlockKey, labels: bytes) -> None:
        """Tiers have the block with these labels."""
        if not self._is_needed:
            return
        self._written[key] = labels
        if labels != self.labels_of(key):
            self._urgent[key] = None

    def changed(self, changes: Iterable[Change]) -> None:
        """Labels have changed: those of blocks in tiers are to be written."""
        if not self._written:
            return
        now_s = self._clock()
        for change in changes:
            stored = [key for key in change.keys if key in self._written]
            if _is_urgent(change):
                self._urgent.update(dict.fromkeys(stored))
            else:
                for key in stored:
                    self._lazy.setdefault(key, now_s)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Tiers do not have these any more."""
        if not self._written:
            return
        for key in keys:
            self._written.pop(key, None)
            self._urgent.pop(key, None)
            self._lazy.pop(key, None)

    def poll(self, *, is_busy: bool) -> None:
        """Begin to write what is due."""
        if self._lazy and not is_busy:
            self._ripen(self._clock() - _LAZY_S)
        while self._urgent and self.num_under_way < _MOST_JOBS:
            self._begin(list(islice(self._urgent, _CHUNK)))

    def make_all_due(self) -> None:
        """What could wait can wait no longer."""
        self._ripen(inf)

    def close(self) -> None:
        """End the thread."""
        self._lane.close(timeout_s=_CLOSING_S)

    def _ripen(self, before_s: float) -> None:
        ripe = []
        for key, since_s in self._lazy.items():
            if since_s > before_s:
                break
            ripe.append(key)
        for key in ripe:
            del self._lazy[key]
            self._urgent[key] = None

    def _begin(self, keys: Sequence[BlockKey]) -> None:
        jobs: list[tuple[BlockKey, bytes]] = []
        for key in keys:
            del self._urgent[key]
            self._lazy.pop(key, None)
            labels = self.labels_of(key)
            if self._written.get(key, labels) != labels and labels:
                self._written[key] = labels
                jobs.append((key, labels))
        if jobs:
            self.num_under_way += 1
            if not self._lane.submit(partial(self._work, jobs)):
                self._finish()

    def _work(self, jobs: Sequence[tuple[BlockKey, bytes]]) -> None:
        try:
            self._stack.relabel(
                {stored_key(key, group): labels for key, labels in jobs for group in self._groups}
            )
        except Exception:  # noqa: BLE001
            # A tier of somebody else's may raise anything; its labels stay as they are.
            _log.exception("writing labels failed")
        finally:
            self._results.add(self._finish)

    def _finish(self) -> None:
        self.num_under_way -= 1


def _is_urgent(change: Change) -> bool:
    old, new = change.old, change.new
    if old is None:
        return True
    return old.tags != new.tags or old.pins != new.pins or not old.sessions <= new.sessions


def _no_labels(_key: BlockKey) -> bytes:
    return b""
