"""Objects on their way out of tiers, beside compute.

From the moment a deletion begins nobody finds what it means: a doomed object is not loaded and not written
anew, so that nothing can come between the order and its end. What a tier did not hear of is not loaded from
it, and it is told again until it answers.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from logging import getLogger
from time import monotonic, sleep

from kvkeep.cache.searches import Searches
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Presence
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Deletion", "Deletions"]

_log = getLogger(__name__)
_CHUNK = 256
_MOST_JOBS = 2**20
# While requests run, between two chunks.
_BUSY_PAUSE_S = 0.002
_CLOSING_S = 60.0
# After which a tier that did not answer is told again.
_RETRY_S = 10.0


@dataclass(slots=True)
class Deletion:
    """An order to forget objects; `num_objects` by tier and group counts those that there were.

    `on_left` hears, once, of objects of which a tier did not hear, by its name.
    """

    # One more while keys may still be added.
    num_jobs: int = 1
    num_objects: dict[tuple[str, int], int] = field(default_factory=dict)
    then: list[Callable[[], None]] = field(default_factory=list)
    on_left: Callable[[str, Sequence[StoredKey]], None] | None = None
    # Parts that wait until a tier answers, by its name.
    name_to_left: Counter[str] = field(default_factory=Counter)

    @property
    def is_done(self) -> bool:
        """Whether all of it is gone, but for what lies where nobody answers."""
        return not self.num_jobs

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Tiers that have not answered."""
        return tuple(sorted(name for name, num_left in self.name_to_left.items() if num_left))

    def begin_job(self) -> None:
        """One job more that is to be ended."""
        self.num_jobs += 1

    def end_job(self) -> None:
        """One job is done, or nothing more is added."""
        self.num_jobs -= 1
        self._end()

    def leave(self, name: str) -> None:
        """A part has to wait until a tier answers."""
        self.name_to_left[name] += 1

    def end_left(self, name: str) -> None:
        """A part does not wait any more."""
        self.name_to_left[name] -= 1
        self._end()

    def _end(self) -> None:
        if self.is_done and not self.not_reached:
            for then in self.then:
                then()

    def when_done(self, then: Callable[[], None]) -> None:
        """Call `then` on the owner's thread when nothing of it lies anywhere, at once if so."""
        if self.is_done and not self.not_reached:
            then()
        else:
            self.then.append(then)


@dataclass(frozen=True, slots=True)
class _Count:
    at: int
    group: int
    num_objects: int


@dataclass(frozen=True, slots=True)
class _Done:
    """What a job has deleted, and the tiers that did not hear of all of it."""

    counts: Sequence[_Count] = ()
    missed: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class _Job:
    deletion: Deletion
    keys: Sequence[StoredKey]
    # None for all.
    among: Sequence[int] | None
    is_again: bool = False


@dataclass(slots=True)
class _Left:
    """What a tier is to be told again."""

    jobs: deque[_Job] = field(default_factory=deque)
    keys: set[StoredKey] = field(default_factory=set)
    retry_at: float = 0.0


class Deletions:
    """All deletions that are under way. Owned by the thread that owns the books; a lane does the work."""

    def __init__(self, stack: TierStack, results: Results) -> None:
        self._stack = stack
        self._results = results
        self._lane = Lane("delete", num_threads=1, max_jobs=_MOST_JOBS)
        self._doomed: dict[StoredKey, int] = {}
        self._num_jobs = 0
        self._left = [_Left() for _ in stack.tiers]
        self.retry_s = _RETRY_S
        self.searches = Searches(stack, results, lambda: self.is_busy)
        self.is_busy = False

    @property
    def num_under_way(self) -> int:
        """Jobs that are not done, a pass over tiers being one."""
        return self._num_jobs + self.searches.num_under_way

    def is_doomed(self, key: StoredKey) -> bool:
        """Whether the object is being deleted."""
        return key in self._doomed

    def is_going(self, at: int, key: StoredKey) -> bool:
        """Whether the object is being deleted, or the tier has yet to hear that it is to go."""
        return key in self._doomed or key in self._left[at].keys

    def add(
        self, deletion: Deletion, keys: Sequence[StoredKey], among: Sequence[int] | None = None
    ) -> None:
        """Forget objects in the tiers `among` (all of them), as part of `deletion`."""
        by_group = sorted(keys, key=lambda key: key[-1])
        for at in range(0, len(by_group), _CHUNK):
            chunk = by_group[at : at + _CHUNK]
            self._submit(_Job(deletion, chunk, among), partial(self._delete, chunk, among))

    def add_found(
        self,
        deletion: Deletion,
        keys: Sequence[StoredKey],
        at: int,
        on_deleted: Callable[[Sequence[StoredKey]], None],
    ) -> None:
        """Forget what a tier had a while ago; `on_deleted` hears on the owner's thread what it still had."""
        for first in range(0, len(keys), _CHUNK):
            chunk = keys[first : first + _CHUNK]
            self._submit(
                _Job(deletion, chunk, (at,)), partial(self._delete_found, chunk, at, on_deleted)
            )

    def add_job(self, deletion: Deletion, work: Callable[[], None]) -> None:
        """Have something done that belongs to `deletion`, before what is added to it from now on."""

        def run() -> _Done:
            work()
            return _Done()

        self._submit(_Job(deletion, (), ()), run)

    def poll(self) -> None:
        """Begin what is due: passes over tiers, and what is to be told again."""
        self.searches.poll()
        for left in self._left:
            if left.jobs and monotonic() >= left.retry_at:
                # One at a time, until it is known that the tier answers.
                left.retry_at = monotonic() + self.retry_s
                job = left.jobs.popleft()
                self._submit(job, partial(self._delete, job.keys, job.among))

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        self.searches.close()
        self._lane.close(timeout_s=_CLOSING_S)

    def _submit(self, job: _Job, work: Callable[[], _Done]) -> None:
        def run() -> None:
            # A tier of somebody else's may raise anything; what it has left is not deleted.
            done = _Done(missed=range(len(self._left)) if job.among is None else job.among)
            try:
                done = work()
            except Exception:  # noqa: BLE001
                _log.exception("deleting from a tier failed")
            finally:
                self._results.add(partial(self._finish, job, done))
            if self.is_busy:
                sleep(_BUSY_PAUSE_S)

        for key in job.keys:
            self._doomed[key] = self._doomed.get(key, 0) + 1
        job.deletion.begin_job()
        self._num_jobs += 1
        if not self._lane.submit(run):
            # Closed, or hopelessly full: done here and now.
            run()

    def _delete_found(
        self,
        keys: Sequence[StoredKey],
        at: int,
        on_deleted: Callable[[Sequence[StoredKey]], None],
    ) -> _Done:
        # Another purge may have come before.
        found = zip(keys, self._stack.tiers[at].find(keys), strict=True)
        present = [key for key, presence in found if presence is Presence.PRESENT]
        done = self._delete(sorted(keys, key=lambda key: key[-1]), (at,))
        if not done.missed:
            self._results.add(partial(on_deleted, present))
        return done

    def _delete(self, keys: Sequence[StoredKey], among: Sequence[int] | None) -> _Done:
        tiers, counts = self._stack.tiers, list[_Count]()
        meant = range(len(tiers)) if among is None else among
        num_before = {at: tiers[at].num_unreached for at in meant}
        for group, own in groupby(keys, key=lambda key: key[-1]):
            batch = list(own)
            if among is None:
                deleted = self._stack.delete(batch)
            else:
                deleted = {at: tiers[at].delete(batch) for at in among}
            counts += [_Count(at, group, num) for at, num in deleted.items() if num]
        return _Done(counts, [at for at in meant if tiers[at].num_unreached != num_before[at]])

    def _finish(self, job: _Job, done: _Done) -> None:
        """On the owner's thread."""
        self._num_jobs -= 1
        deletion, chunk, counts = job.deletion, job.keys, done.counts
        if chunk:
            self._note_reach(job, done)
        for key in chunk:
            self._doomed[key] -= 1
            if not self._doomed[key]:
                del self._doomed[key]
        for one in counts:
            place = (self._stack.tiers[one.at].name, one.group)
            deletion.num_objects[place] = deletion.num_objects.get(place, 0) + one.num_objects
        deletion.end_job()

    def _note_reach(self, job: _Job, done: _Done) -> None:
        """Whom of its tiers a job has to be told again."""
        for at in done.missed:
            left, name = self._left[at], self._stack.tiers[at].name
            if not job.is_again:
                job.deletion.leave(name)
                if job.deletion.on_left is not None:
                    job.deletion.on_left(name, job.keys)
            left.jobs.append(_Job(job.deletion, job.keys, (at,), is_again=True))
            left.keys.update(job.keys)
            left.retry_at = monotonic() + self.retry_s
        if job.is_again and job.among and not done.missed:
            left = self._left[job.among[0]]
            left.keys.difference_update(job.keys)
            # It answers: the next one at once.
            left.retry_at = 0.0
            job.deletion.end_left(self._stack.tiers[job.among[0]].name)
