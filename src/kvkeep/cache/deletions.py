"""Objects on their way out of tiers, beside compute.

From the moment a deletion begins nobody finds what it means: a doomed object is not loaded and not written
anew, so that nothing can come between the order and its end.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from logging import getLogger
from time import sleep

from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Labelled
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Deletion", "Deletions"]

_log = getLogger(__name__)
_CHUNK = 256
_MOST_JOBS = 2**20
# While requests run, between two chunks.
_BUSY_PAUSE_S = 0.002
_CLOSING_S = 60.0


@dataclass(slots=True)
class Deletion:
    """An order to forget objects; `num_objects` by tier and group counts those that there were."""

    # One more while keys may still be added.
    num_jobs: int = 1
    num_objects: dict[tuple[str, int], int] = field(default_factory=dict)
    # Blocks that only a search has found.
    found: set[BlockKey] = field(default_factory=set)
    then: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether all of it is gone."""
        return not self.num_jobs

    def end_job(self) -> None:
        """One job is done, or nothing more is added."""
        self.num_jobs -= 1
        if self.is_done:
            for then in self.then:
                then()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` on the owner's thread when it is done, at once if it is."""
        if self.is_done:
            then()
        else:
            self.then.append(then)


@dataclass(frozen=True, slots=True)
class _Count:
    at: int
    group: int
    num_objects: int
    found: tuple[BlockKey, ...] = ()


class Deletions:
    """All deletions that are under way. Owned by the thread that owns the books; a lane does the work."""

    def __init__(self, stack: TierStack, results: Results) -> None:
        self._stack = stack
        self._results = results
        self._lane = Lane("delete", num_threads=1, max_jobs=_MOST_JOBS)
        self._doomed: dict[StoredKey, int] = {}
        self.num_under_way = 0
        self.is_busy = False

    def is_doomed(self, key: StoredKey) -> bool:
        """Whether the object is being deleted."""
        return key in self._doomed

    def add(
        self, deletion: Deletion, keys: Sequence[StoredKey], among: Sequence[int] | None = None
    ) -> None:
        """Forget objects in the tiers `among` (all of them), as part of `deletion`."""
        by_group = sorted(keys, key=lambda key: key[-1])
        for at in range(0, len(by_group), _CHUNK):
            chunk = by_group[at : at + _CHUNK]
            for key in chunk:
                self._doomed[key] = self._doomed.get(key, 0) + 1
            self._submit(deletion, chunk, partial(self._delete, chunk, among))

    def search(
        self,
        deletion: Deletion,
        fits: Callable[[Labelled], bool],
        among: Sequence[int],
    ) -> None:
        """Forget, as part of `deletion`, what tiers have that is not known here, if it fits."""
        for at in among:
            self._submit(deletion, (), partial(self._search, at, fits))

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._lane.close(timeout_s=_CLOSING_S)

    def _submit(
        self, deletion: Deletion, chunk: Sequence[StoredKey], work: Callable[[], list[_Count]]
    ) -> None:
        def run() -> None:
            counts: list[_Count] = []
            try:
                counts = work()
            except Exception:  # noqa: BLE001
                # A tier of somebody else's may raise anything; what it has left is not deleted.
                _log.exception("deleting from a tier failed")
            finally:
                self._results.add(partial(self._finish, deletion, chunk, counts))
            if self.is_busy:
                sleep(_BUSY_PAUSE_S)

        deletion.num_jobs += 1
        self.num_under_way += 1
        if not self._lane.submit(run):
            # Closed, or hopelessly full: done here and now.
            run()

    def _delete(self, keys: Sequence[StoredKey], among: Sequence[int] | None) -> list[_Count]:
        counts: list[_Count] = []
        for group, own in groupby(keys, key=lambda key: key[-1]):
            batch = list(own)
            if among is None:
                deleted = self._stack.delete(batch)
            else:
                deleted = {at: self._stack.tiers[at].delete(batch) for at in among}
            counts += [_Count(at, group, num) for at, num in deleted.items() if num]
        return counts

    def _search(self, at: int, fits: Callable[[Labelled], bool]) -> list[_Count]:
        tier = self._stack.tiers[at]
        counts: list[_Count] = []
        for batch in _batches(one.key for one in tier.labelled() if fits(one)):
            found = tuple({BlockKey(key[:-1]) for key in batch})
            counts += [replace(one, found=found) for one in self._delete(batch, (at,))]
        return counts

    def _finish(
        self, deletion: Deletion, chunk: Sequence[StoredKey], counts: Sequence[_Count]
    ) -> None:
        """On the owner's thread."""
        self.num_under_way -= 1
        for key in chunk:
            self._doomed[key] -= 1
            if not self._doomed[key]:
                del self._doomed[key]
        for one in counts:
            place = (self._stack.tiers[one.at].name, one.group)
            deletion.num_objects[place] = deletion.num_objects.get(place, 0) + one.num_objects
            deletion.found.update(one.found)
        deletion.end_job()


def _batches(keys: Iterator[StoredKey]) -> Iterator[list[StoredKey]]:
    """Keys in lists, those of a group together within each."""
    batch: list[StoredKey] = []
    for key in keys:
        batch.append(key)
        if len(batch) == _CHUNK:
            yield sorted(batch, key=lambda one: one[-1])
            batch = []
    if batch:
        yield sorted(batch, key=lambda one: one[-1])
