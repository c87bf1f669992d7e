"""Sessions: who has used what last, about what, and when it ends."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.blocks import TokenChain
from kvkeep.cache.lifetimes.labels import SessionId
from kvkeep.spec import BlockKey

__all__ = ["Session", "Sessions"]

# Names of sessions that ended, so that labels which are still to be written anew do not bring them back.
_MOST_ENDED = 2**14


@dataclass(slots=True)
class Session:
    """One session. `chain` is that of its last request that ended, None where that was before the start."""

    session_id: SessionId
    created_at: float
    used_at: float
    chain: TokenChain | None = None
    context: str | None = None
    num_auto: int = 0
    num_requests: int = 0
    num_open: int = 0

    @property
    def last_keys(self) -> Sequence[BlockKey]:
        """The full blocks of its last request."""
        return () if self.chain is None else self.chain.keys


class Sessions:
    """All sessions, the longest unused first: they begin with a use and end `ttl_s` after the last one."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._sessions: OrderedDict[SessionId, Session] = OrderedDict()
        self._ended: OrderedDict[SessionId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: SessionId) -> Session | None:
        """The session, None where there is none."""
        return self._sessions.get(session_id)

    def all(self) -> list[Session]:
        """All sessions, the longest unused first."""
        return list(self._sessions.values())

    def use(self, session_id: SessionId, now_s: float) -> Session:
        """The session, begun now if need be, as used now."""
        session = self._sessions.get(session_id)
        if session is None:
            session = self._sessions[session_id] = Session(session_id, now_s, now_s)
            self._ended.pop(session_id, None)
        session.used_at = now_s
        self._sessions.move_to_end(session_id)
        return session

    def end(self, session_id: SessionId) -> Session | None:
        """Forget a session; returns what it was."""
        self._ended[session_id] = None
        self._ended.move_to_end(session_id)
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        return self._sessions.pop(session_id, None)

    def has_ended(self, session_id: SessionId) -> bool:
        """Whether it ended a while ago and did not begin again."""
        return session_id in self._ended

    def ends_at(self, session: Session) -> float:
        """When it ends if it is not used any more."""
        return session.used_at + self._ttl_s

    @property
    def next_end(self) -> float:
        """No session ends of itself before this time."""
        for session in self._sessions.values():
            return self.ends_at(session)
        return float("inf")

    def due(self, now_s: float) -> list[SessionId]:
        """Sessions that nobody has used for too long; those with open requests are in use."""
        due = []
        for session_id, session in self._sessions.items():
            if self.ends_at(session) > now_s:
                break
            due.append(session_id)
        for session_id in due:
            if self._sessions[session_id].num_open:
                self.use(session_id, now_s)
        return [one for one in due if not self._sessions[one].num_open]
