"""What purges mean and nobody here knows: looked for in tiers by the labels that lie there.

Blocks of earlier runs and of other machines. One pass serves all purges that wait for one, and whoever is in
no hurry waits for others.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from logging import getLogger
from time import monotonic, perf_counter, sleep

from kvkeep.cache.lifetimes import Query, decode_labels
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Labelled
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Found", "Search", "Searches"]

_log = getLogger(__name__)
_CHUNK = 256
# A purge that can wait does so for this long, or until this many wait, or one comes that cannot. Passes for
# such take a tenth of the time at the most.
_PATIENCE_S = 5.0
_MOST_WAITING = 32
_REST_PER_PASS = 9.0
_MOST_JUDGED = 4096
# After which tiers that did not answer are asked again.
_RETRY_S = 10.0


@dataclass(eq=False, frozen=True, kw_only=True, slots=True)
class Search:
    """A purge's part: what fits, was created by `until` and lies in the tiers `among`.

    `on_found` and `on_done`, with the search as it is by then and the tiers that did not show all that they
    have, are called on the owner's thread.
    """

    query: Query
    until: float
    among: Collection[int]
    on_found: Callable[["Found"], None]
    on_done: Callable[["Search", Sequence[int]], None]

    def renewed(self, later: Query) -> "Search":
        """The same once `later` has begun."""
        return replace(self, query=self.query.renewed(later))

    def judge(self, encoded: bytes) -> "_Verdict":
        """What becomes of objects with these labels."""
        query, labels = self.query, decode_labels(encoded)
        if labels is None:
            is_all = query == Query(include_pinned=query.include_pinned, tiers=query.tiers)
            return _Verdict(is_meant=is_all)
        if labels.created_at > self.until:
            return _Verdict()
        is_spared = query.spares(labels)
        return _Verdict(is_meant=query.fits(labels) and not is_spared, is_spared=is_spared)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    is_meant: bool = False
    is_spared: bool = False


@dataclass(slots=True)
class Found:
    """Objects of one tier: those that are meant, with their labels, and blocks that are but for a pin."""

    at: int
    meant: dict[StoredKey, bytes] = field(default_factory=dict)
    pinned: list[BlockKey] = field(default_factory=list)


class Searches:
    """Passes over tiers, one at a time. Owned by the thread that owns the books; a lane reads."""

    def __init__(self, stack: TierStack, results: Results, is_busy: Callable[[], bool]) -> None:
        self._stack = stack
        self._is_busy = is_busy
        self._results = results
        self._lane = Lane("search", num_threads=1, max_jobs=1)
        self._waiting: list[Search] = []
        # Of the pass that goes on.
        self._passing: list[Search] = []
        # Of tiers that did not answer.
        self._left: list[Search] = []
        self._begins_at = self._rests_until = self._retry_at = 0.0
        self.retry_s = _RETRY_S

    @property
    def num_under_way(self) -> int:
        """Passes that go on."""
        return int(bool(self._passing))

    def add(self, search: Search, *, is_urgent: bool) -> None:
        """Look as soon as the pass that goes on is over, or when it suits."""
        if search.query.versions:
            for pending in (self._waiting, self._passing, self._left):
                pending[:] = [one.renewed(search.query) for one in pending]
        wanted_at = 0.0 if is_urgent else max(monotonic() + _PATIENCE_S, self._rests_until)
        self._begins_at = min(wanted_at, self._begins_at) if self._waiting else wanted_at
        self._waiting.append(search)
        self.poll()

    def add_left(self, search: Search) -> None:
        """Look again in a while: a tier did not answer."""
        self._left.append(search)
        self._retry_at = monotonic() + self.retry_s

    def poll(self) -> None:
        """Begin a pass that is due."""
        if self._left and monotonic() >= self._retry_at and not self.num_under_way:
            self._waiting += self._left
            self._left, self._begins_at = [], 0.0
        is_due = monotonic() >= self._begins_at or len(self._waiting) >= _MOST_WAITING
        if self._waiting and is_due and not self.num_under_way:
            self._passing, self._waiting = self._waiting, []
            if not self._lane.submit(partial(self._work, tuple(self._passing))):
                # Closed: the journal has what was not looked for.
                self._passing = []

    def close(self) -> None:
        """Let the pass that goes on come to its end; those that wait are given up."""
        self._waiting = []
        self._lane.close()

    def _work(self, searches: Sequence[Search]) -> None:
        """On the lane's thread."""
        start, missed = perf_counter(), set[int]()
        for at, tier in enumerate(self._stack.tiers):
            sought = [one for one in searches if at in one.among]
            num_before = tier.num_unreached
            try:
                if sought:
                    self._look_through(at, sought)
            except Exception:  # noqa: BLE001
                # A tier of somebody else's may raise anything; what it has is judged when it comes.
                _log.exception("looking through a tier failed")
                missed.add(at)
            if tier.num_unreached != num_before:
                missed.add(at)
        self._results.add(partial(self._finish, missed, perf_counter() - start))

    def _finish(self, missed: set[int], took_s: float) -> None:
        """On the owner's thread."""
        self._rests_until = monotonic() + _REST_PER_PASS * took_s
        searches, self._passing = self._passing, []
        for one in searches:
            one.on_done(one, sorted(missed.intersection(one.among)))
        self.poll()

    def _look_through(self, at: int, sought: Sequence[Search]) -> None:
        objects = iter(self._stack.tiers[at].labelled())
        # Many objects bear the same labels.
        judged: dict[bytes, list[_Verdict]] = {}
        while True:
            start = perf_counter()
            chunk = list(islice(objects, _CHUNK))
            if not chunk:
                return
            if len(judged) > _MOST_JUDGED:
                judged.clear()
            for encoded in {one.labels for one in chunk}.difference(judged):
                judged[encoded] = [one.judge(encoded) for one in sought]
            for number, search in enumerate(sought):
                verdicts = {one.labels: judged[one.labels][number] for one in chunk}
                found = _found(at, search.query, chunk, verdicts)
                if found.meant or found.pinned:
                    self._results.add(partial(search.on_found, found))
            if self._is_busy():
                # Requests that run get the other half of the time.
                sleep(perf_counter() - start)


def _found(
    at: int, query: Query, chunk: Sequence[Labelled], verdicts: dict[bytes, _Verdict]
) -> Found:
    found = Found(at)
    for one in chunk:
        verdict = verdicts[one.labels]
        if verdict.is_meant or verdict.is_spared:
            key = BlockKey(one.key[:-1])
            if query.keys is not None and key not in query.keys:
                continue
            if verdict.is_meant:
                found.meant[one.key] = one.labels
            else:
                found.pinned.append(key)
    return found
