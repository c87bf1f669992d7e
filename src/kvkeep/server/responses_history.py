"""Responses that may be read and continued by their id, kept in memory for a while."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
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


class ResponseHistory:
    """The newest responses of all tenants, bounded in bytes and in time; the oldest go first.

    A tenant finds only its own. Used by the event loop alone, so there is no lock.
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
        self._entries: OrderedDict[tuple[str | None, str], _Entry] = OrderedDict()
        self._num_bytes = 0
        self._session_to_responses: Counter[tuple[str | None, str]] = Counter()
        self._ended: list[KeptResponse] = []

    @property
    def num_bytes(self) -> int:
        """Size of all that is kept, as JSON."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, owner: str | None, response_id: str) -> KeptResponse | None:
        """The owner's response of this id, None when there is none any more. Changes nothing."""
        entry = self._entries.get((owner, response_id))
        return None if entry is None or entry.expires_at <= self._clock() else entry.kept

    def keep(self, owner: str | None, kept: KeptResponse) -> None:
        """Keep a new response; others go when their time is over or their room is needed."""
        num_bytes = len(msgspec.json.encode((kept.response, kept.messages)))
        now = self._clock()
        self._entries[owner, kept.response_id] = _Entry(kept, num_bytes, now + self._ttl_s)
        self._session_to_responses[owner, kept.session] += 1
        self._num_bytes += num_bytes
        while self._entries:
            key, oldest = next(iter(self._entries.items()))
            if oldest.expires_at > now and self._num_bytes <= self._max_bytes:
                return
            self._remove(key)

    def drop(self, owner: str | None, response_id: str) -> KeptResponse | None:
        """Forget the owner's response; returns it, or None when there was none."""
        found = self.find(owner, response_id)
        if found is not None:
            self._remove((owner, response_id))
        return found

    def take_ended(self) -> list[KeptResponse]:
        """The last responses of conversations that cannot be continued any more; each is given once.

        Only of those whose session the server chose: nobody else knows its name.
        """
        ended, self._ended = self._ended, []
        return ended

    def _remove(self, key: tuple[str | None, str]) -> None:
        entry = self._entries.pop(key)
        self._num_bytes -= entry.num_bytes
        session = (key[0], entry.kept.session)
        self._session_to_responses[session] -= 1
        if not self._session_to_responses[session]:
            del self._session_to_responses[session]
            if entry.kept.owns_session:
                self._ended.append(entry.kept)
