"""Labels of blocks that lie in tiers, written again when they have changed.

What a purge has to find after a crash is written at once: tags, pins, and that a session has ended. A longer
life or one more session is written when there is time, and when the cache is closed: lost, it costs a miss.

Others may write labels of the same objects: what they have changed stays, and becomes known here. Where
labels cannot be replaced, an object that would be kept or served too long by its old ones is deleted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from logging import getLogger
from math import inf
from time import time

from kvkeep.blocks import stored_key
from kvkeep.cache.lifetimes import Change
from kvkeep.cache.lifetimes.labels import Labels, decode_labels, encode_labels
from kvkeep.cache.lifetimes.merging import is_stricter, left_of, revised_labels
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Tier
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Relabels"]

_log = getLogger(__name__)
_CHUNK = 32
_MOST_JOBS = 4
_CLOSING_S = 60.0
# A change that can wait is written so long after it was made; so is one that failed, and so often.
_LAZY_S = 30.0
_MOST_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Job:
    """A block and the labels that it is to have; `bases` are those that each tier had at last.

    Where nobody has looked they are b"": there it bears `usual`, as elsewhere, or what others have written.
    """

    key: BlockKey
    labels: bytes
    bases: Sequence[bytes]
    usual: bytes


@dataclass(slots=True)
class _Revised:
    """What became of the labels of some blocks in one tier: those there now, and where that failed."""

    at: int
    labels: dict[BlockKey, bytes] = field(default_factory=dict)
    failed: set[BlockKey] = field(default_factory=set)
    deleted: list[StoredKey] = field(default_factory=list)


class Relabels:
    """What tiers say of blocks, compared with what is so. Owned by the thread that owns the books."""

    def __init__(
        self,
        stack: TierStack,
        results: Results,
        num_groups: int,
        clock: Callable[[], float],
    ) -> None:
        self._results = results
        self._groups = range(num_groups)
        self._clock = clock
        self._lane = Lane("relabel", num_threads=1, max_jobs=_MOST_JOBS)
        self.labels_of: Callable[[BlockKey], bytes] = _no_labels
        self.wall_clock: Callable[[], float] = time
        # Who hears of labels that others have written, and of objects that had to go.
        self.on_seen: Callable[[BlockKey, bytes], None] = _ignore
        self.on_deleted: Callable[[Sequence[StoredKey]], None] = _ignore_all
        self._tiers = [
            (at, tier) for at, tier in enumerate(stack.tiers) if tier.capabilities.keeps_labels
        ]
        # What only this process sees, while it lives, has to be told of priorities alone.
        self._outlives = any(tier.capabilities.is_persistent for _, tier in self._tiers)
        # By tier: the labels that blocks have there, b"" where they are not known.
        self._written: list[dict[BlockKey, bytes]] = [{} for _ in stack.tiers]
        self._urgent: dict[BlockKey, None] = {}
        self._lazy: dict[BlockKey, float] = {}
        self._num_tries: list[dict[BlockKey, int]] = [{} for _ in stack.tiers]
        self.num_under_way = 0

    @property
    def num_pending(self) -> int:
        """Blocks whose labels are to be written, at once or some time."""
        return len(self._urgent) + len(self._lazy)

    def knows(self, key: BlockKey, labels: bytes, at: int) -> bool:
        """Whether a tier, which a while ago had the block with these labels, has none that others wrote."""
        written = self._written[at].get(key, b"")
        return bool(written) and written in (labels, self.labels_of(key))

    def note(self, key: BlockKey, labels: bytes, at: int) -> None:
        """A tier has the block with these labels; b"" where it has others, or none."""
        self._written[at][key] = labels
        if labels != self.labels_of(key):
            self._urgent[key] = None

    def changed(self, changes: Iterable[Change]) -> None:
        """Labels have changed: those of blocks in tiers are to be written."""
        now_s = self._clock()
        for change in changes:
            if not self._outlives and not _is_ranked_anew(change):
                continue
            stored = [key for key in change.keys if self._is_noted(key)]
            if _is_urgent(change):
                self._urgent.update(dict.fromkeys(stored))
            else:
                for key in stored:
                    self._lazy.setdefault(key, now_s)

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Tiers do not have these any more."""
        if not any(self._written):
            return
        for key in keys:
            self._urgent.pop(key, None)
            self._lazy.pop(key, None)
            for written, num_tries in zip(self._written, self._num_tries, strict=True):
                written.pop(key, None)
                num_tries.pop(key, None)

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

    # --- parts -------------------------------------------------------------------------------------

    def _is_noted(self, key: BlockKey) -> bool:
        return any(key in written for written in self._written)

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
        jobs: list[_Job] = []
        for key in keys:
            del self._urgent[key]
            self._lazy.pop(key, None)
            labels = self.labels_of(key)
            known = [written[key] for written in self._written if key in written]
            if labels and any(one != labels for one in known):
                bases = [written.get(key, b"") for written in self._written]
                jobs.append(_Job(key, labels, bases, next(filter(None, known), b"")))
        if jobs:
            self.num_under_way += 1
            if not self._lane.submit(partial(self._work, jobs)):
                self._finish([])

    def _finish(self, revisions: Sequence[_Revised]) -> None:
        """On the owner's thread."""
        self.num_under_way -= 1
        for one in revisions:
            written = self._written[one.at]
            for key, labels in one.labels.items():
                if not self.labels_of(key):
                    # Forgotten meanwhile.
                    continue
                written[key] = labels
                self._num_tries[one.at].pop(key, None)
                if labels != self.labels_of(key):
                    self.on_seen(key, labels)
            for key in one.failed & written.keys():
                self._try_again(key, one.at)
            if one.deleted:
                self.on_deleted(one.deleted)
            for stored in one.deleted:
                written.pop(BlockKey(stored[:-1]), None)

    def _try_again(self, key: BlockKey, at: int) -> None:
        """Later, since a tier may not answer; but not for ever, since it may have it no more."""
        tries = self._num_tries[at]
        tries[key] = tries.get(key, 0) + 1
        if tries[key] < _MOST_TRIES:
            self._lazy.setdefault(key, self._clock())
        else:
            del self._written[at][key], tries[key]

    # --- on the lane's thread ------------------------------------------------------------------------

    def _work(self, jobs: Sequence[_Job]) -> None:
        revisions = []
        try:
            for at, tier in self._tiers:
                revisions.append(self._revise(at, tier, jobs))
        except Exception:  # noqa: BLE001
            # A tier of somebody else's may raise anything; its labels stay as they are.
            _log.exception("writing labels failed")
        finally:
            self._results.add(partial(self._finish, revisions))

    def _revise(self, at: int, tier: Tier, jobs: Sequence[_Job]) -> _Revised:
        """Write the labels of some blocks to a tier, where it has them."""
        key_to_job = {stored: job for job in jobs for stored in self._stored(job.key)}
        revision = _Revision(at, relabels=tier.capabilities.relabels, now_s=self.wall_clock())

        def change(stored: StoredKey, theirs: bytes) -> bytes | None:
            return revision.change(stored, theirs, key_to_job[stored])

        are_done = tier.revise_labels(list(key_to_job), change)
        done = {stored for stored, is_done in zip(key_to_job, are_done, strict=True) if is_done}
        doomed = sorted(revision.doomed)
        if doomed and tier.delete(doomed) < len(doomed):
            done -= revision.doomed
        revised = _Revised(at, deleted=doomed)
        for job in jobs:
            asked = [one for one in self._stored(job.key) if one in revision.labels]
            # A part of another group may be elsewhere, or nowhere.
            if not asked or not done.issuperset(asked):
                revised.failed.add(job.key)
            elif revision.doomed.isdisjoint(asked):
                revised.labels[job.key] = revision.labels[asked[0]]
        return revised

    def _stored(self, key: BlockKey) -> Iterator[StoredKey]:
        return (stored_key(key, group) for group in self._groups)


class _Revision:
    """Says what labels of objects in one tier are to become, and which of them have to go."""

    def __init__(self, at: int, *, relabels: bool, now_s: float) -> None:
        self._at = at
        self._relabels = relabels
        self._now_s = now_s
        self._known: dict[tuple[bytes, ...], Labels] = {}
        self.labels: dict[StoredKey, bytes] = {}
        self.doomed: set[StoredKey] = set()

    def change(self, stored: StoredKey, theirs: bytes, job: _Job) -> bytes | None:
        """The labels to be written, None where those that are there are right, or the object must go."""
        new = self._merged(theirs, job)
        encoded = theirs if theirs == job.labels else encode_labels(new)
        self.labels[stored] = theirs if not self._relabels else encoded
        self.doomed.discard(stored)
        if new.is_orphaned or (not self._relabels and is_stricter(decode_labels(theirs), new)):
            self.doomed.add(stored)
            return None
        return None if self.labels[stored] == theirs else encoded

    def _merged(self, theirs: bytes, job: _Job) -> Labels:
        base = job.bases[self._at]
        # Few differ: a session's blocks change together.
        words = (theirs, job.labels, base, job.usual)
        if words not in self._known:
            ours = decode_labels(job.labels)
            assert ours is not None
            usual, known = decode_labels(job.usual), decode_labels(base)
            if known is None and usual is not None:
                known = left_of(usual, ours)
            found = decode_labels(theirs)
            self._known[words] = revised_labels(found, ours, known, self._now_s)
        return self._known[words]


def _is_urgent(change: Change) -> bool:
    old, new = change.old, change.new
    if old is None:
        return True
    is_left = not old.sessions <= new.sessions
    return old.tags != new.tags or old.pins != new.pins or is_left or _is_ranked_anew(change)


def _is_ranked_anew(change: Change) -> bool:
    return change.old is not None and change.old.priority != change.new.priority


def _no_labels(_key: BlockKey) -> bytes:
    return b""


def _ignore(_key: BlockKey, _labels: bytes) -> None:
    """Nobody wants to know."""


def _ignore_all(_keys: Sequence[StoredKey]) -> None:
    """Nobody wants to know."""
