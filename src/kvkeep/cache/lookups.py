"""Questions to tiers behind wires, asked while a request waits for its turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Presence
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack

__all__ = ["Lookup", "Lookups"]

_log = getLogger(__name__)

# An answer that takes longer is not waited for.
_DEADLINE_S = 2.0
_MOST_JOBS = 1024


@dataclass(slots=True)
class Lookup:
    """What a request knows of tiers beside what they say themselves.

    `found` has the tier of each block that lies behind a wire; `avoided` are those that failed to load.
    """

    deadline_s: float
    is_done: bool = False
    found: dict[StoredKey, int] = field(default_factory=dict)
    avoided: set[StoredKey] = field(default_factory=set)


class Lookups:
    """Asks on threads; owned by the thread that owns the books."""

    def __init__(self, stack: TierStack, results: Results, clock: Callable[[], float]) -> None:
        self._stack = stack
        self._results = results
        self._clock = clock
        self._lane = Lane("lookup", num_threads=2, max_jobs=_MOST_JOBS)
        self._deleted: set[StoredKey] = set()
        self.num_under_way = 0

    def begin(self, keys: Sequence[StoredKey]) -> Lookup:
        """Ask for keys; done at once where there is no such tier, or nothing to ask."""
        lookup = Lookup(self._clock() + _DEADLINE_S)
        if not keys or not self._stack.distant:
            lookup.is_done = True
        elif self._lane.submit(partial(self._work, list(keys), lookup)):
            self.num_under_way += 1
        else:
            lookup.is_done = True
        return lookup

    def is_ready(self, lookup: Lookup) -> bool:
        """Whether the answer is there, or was waited for long enough."""
        return lookup.is_done or self._clock() > lookup.deadline_s

    def ask(self, keys: Sequence[StoredKey]) -> Lookup:
        """Ask and wait for the answer."""
        return Lookup(0.0, is_done=True, found=self._find(keys))

    def forget(self, keys: Sequence[StoredKey]) -> None:
        """These are deleted: an answer that is on its way must not bring them back."""
        if self.num_under_way:
            self._deleted.update(keys)

    def close(self) -> None:
        """End the threads."""
        self._lane.close()

    def _find(self, keys: Sequence[StoredKey]) -> dict[StoredKey, int]:
        sightings = self._stack.find(keys, self._stack.distant)
        return {
            key: sighting.at
            for key, sighting in sightings.items()
            if sighting.presence is Presence.PRESENT
        }

    def _work(self, keys: Sequence[StoredKey], lookup: Lookup) -> None:
        found: dict[StoredKey, int] = {}
        try:
            found = self._find(keys)
        except Exception:  # noqa: BLE001
            # A tier of somebody else's may raise anything; to us it has nothing.
            _log.exception("asking a tier failed")
        finally:
            self._results.add(partial(self._finish, lookup, found))

    def _finish(self, lookup: Lookup, found: dict[StoredKey, int]) -> None:
        self.num_under_way -= 1
        lookup.found = {key: at for key, at in found.items() if key not in self._deleted}
        lookup.is_done = True
        if not self.num_under_way:
            self._deleted.clear()
