"""Responses that may be read and continued by their id, kept in memory for a while."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import msgspec

__all__ = ["KeptResponse", "ResponseHistory"]

_DAY_S = 86400.0
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptResponse:
    """A response as it was given, and the conversation up to its end, without instructions.

    `session` is the cache's name for the conversation under `salt`; `owns_session`: the server chose it.
    """

    response: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    session: str
    salt: str | None
    owns_session: bool

    @property
    def response_id(self) -> str:
        """What a client calls it."""
        return str(self.response["id"])


@dataclass(frozen=True, slots=True)
class _Entry:
    kept: KeptResponse
    num_bytes: int
    expires_at: float


class _Shelf:
    """The responses of one tenant, the oldest first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, _Entry] = OrderedDict()
        self.num_bytes = 0

    def put(self, entry: _Entry) -> None:
        self.entries[entry.kept.response_id] = entry
        self.num_bytes += entry.num_bytes

    def take(self, response_id: str) -> _Entry:
        entry = self.entries.pop(response_id)
        self.num_bytes -= entry.num_bytes
        return entry

    @property
    def oldest(self) -> _Entry:
        return next(iter(self.entries.values()))


class ResponseHistory:
    """The newest responses of all tenants, bounded in bytes and in time.

    A tenant finds only its own, and who has most makes room: its oldest go first. Used by the event loop
    alone, so there is no lock.
    """

    def __init__(
        self,
        *,
        max_bytes: int = _MAX_BYTES,
        ttl_s: float = _DAY_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        # No shelf is empty.
        self._owner_to_shelf: dict[str | None, _Shelf] = {}
        self._session_to_responses: Counter[tuple[str | None, str]] = Counter()
        self._ended: list[KeptResponse] = []

    @property
    def num_bytes(self) -> int:
        """Size of all that is kept, as JSON."""
        return sum(shelf.num_bytes for shelf in self._owner_to_shelf.values())

    def __len__(self) -> int:
        return sum(len(shelf.entries) for shelf in self._owner_to_shelf.values())

    def find(self, owner: str | None, response_id: str) -> KeptResponse | None:
        """The owner's response of this id, None when there is none any more. Changes nothing."""
        shelf = self._owner_to_shelf.get(owner)
        entry = None if shelf is None else shelf.entries.get(response_id)
        return None if entry is None or entry.expires_at <= self._clock() else entry.kept

    def keep(self, owner: str | None, kept: KeptResponse) -> None:
        """Keep a new response; others go when their time is over, or when the owner with most has to."""
        num_bytes = len(msgspec.json.encode((kept.response, kept.messages)))
        now = self._clock()
        shelf = self._owner_to_shelf.setdefault(owner, _Shelf())
        shelf.put(_Entry(kept, num_bytes, now + self._ttl_s))
        self._session_to_responses[owner, kept.session] += 1
        for whose in list(self._owner_to_shelf):
            self._remove_expired(whose, now)
        while self.num_bytes > self._max_bytes:
            shelves = self._owner_to_shelf
            largest = max(shelves, key=lambda whose: shelves[whose].num_bytes)
            self._remove(largest, shelves[largest].oldest.kept.response_id)

    def drop(self, owner: str | None, response_id: str) -> KeptResponse | None:
        """Forget the owner's response; returns it, or None when there was none."""
        found = self.find(owner, response_id)
        if found is not None:
            self._remove(owner, response_id)
        return found

    def erase(self, salts: Collection[str | None]) -> None:
        """Forget all responses under these salts; who erases their salts ends their sessions."""
        for owner, shelf in list(self._owner_to_shelf.items()):
            for entry in [one for one in shelf.entries.values() if one.kept.salt in salts]:
                self._remove(owner, entry.kept.response_id)
        self._ended = [one for one in self._ended if one.salt not in salts]

    def take_ended(self) -> list[KeptResponse]:
        """The last responses of conversations that cannot be continued any more; each is given once.

        Only of those whose session the server chose: nobody else knows its name.
        """
        ended, self._ended = self._ended, []
        return ended

    def _remove_expired(self, owner: str | None, now: float) -> None:
        while owner in self._owner_to_shelf:
            oldest = self._owner_to_shelf[owner].oldest
            if oldest.expires_at > now:
                return
            self._remove(owner, oldest.kept.response_id)

    def _remove(self, owner: str | None, response_id: str) -> None:
        shelf = self._owner_to_shelf[owner]
        entry = shelf.take(response_id)
        if not shelf.entries:
            del self._owner_to_shelf[owner]
        session = (owner, entry.kept.session)
        self._session_to_responses[session] -= 1
        if not self._session_to_responses[session]:
            del self._session_to_responses[session]
            if entry.kept.owns_session:
                self._ended.append(entry.kept)
