"""Sessions: who has used what last, about what, and when it ends."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from kvkeep.blocks import TokenChain
from kvkeep.cache.lifetimes.labels import SessionId
from kvkeep.spec import BlockKey

__all__ = ["Session", "Sessions"]

# Names of sessions that ended, so that labels which are still to be written anew do not bring them back.
_MOST_ENDED = 2**14
# Sessions of which nothing is left are looked for beyond this many, so many at once.
_FEWEST_PRUNED = 4096
_PRUNED_AT_ONCE = 256


@dataclass(slots=True)
class Session:
    """One session. `chain` is that of its last request that ended, None where that was before the start.

    `ttl_s` is after how long without use it ends, None for as all others.
    """

    session_id: SessionId
    created_at: float
    used_at: float
    chain: TokenChain | None = None
    context: str | None = None
    num_auto: int = 0
    num_requests: int = 0
    num_open: int = 0
    ttl_s: float | None = None

    @property
    def last_keys(self) -> Sequence[BlockKey]:
        """The full blocks of its last request."""
        return () if self.chain is None else self.chain.keys


class Sessions:
    """All sessions: they begin with a use and end `ttl_s` after the last one, or their own `ttl_s`."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        # The longest unused first, so that the first one ends first; those with a life of their own apart.
        self._common: OrderedDict[SessionId, Session] = OrderedDict()
        self._own: dict[SessionId, Session] = {}
        # Of earlier runs, as long as it is not known when they were used last.
        self._restored: dict[SessionId, Session] = {}
        # None of the latter ends before it; later than it says where they were used since.
        self._own_end = inf
        self._ended: OrderedDict[SessionId, None] = OrderedDict()
        self._prune_at = _FEWEST_PRUNED
        self._unpruned: list[SessionId] = []

    def __len__(self) -> int:
        return len(self._common) + len(self._own) + len(self._restored)

    def get(self, session_id: SessionId) -> Session | None:
        """The session, None where there is none."""
        sessions = (self._common, self._own, self._restored)
        return next((one[session_id] for one in sessions if session_id in one), None)

    def all(self) -> list[Session]:
        """All sessions, the longest unused first."""
        sessions = (self._common, self._own, self._restored)
        return sorted((one for part in sessions for one in part.values()), key=_used_at)

    def use(self, session_id: SessionId, now_s: float) -> Session:
        """The session, begun now if need be, as used now."""
        session = self.get(session_id)
        if session is None:
            session = self._common[session_id] = Session(session_id, now_s, now_s)
            self._ended.pop(session_id, None)
        session.used_at = now_s
        if session.ttl_s is None:
            self._restored.pop(session_id, None)
            self._common[session_id] = session
            self._common.move_to_end(session_id)
        return session

    def restore(self, session_id: SessionId, created_at: float) -> None:
        """A block of an earlier run is a session's: it was used then, if not later."""
        session = self.get(session_id)
        if session is None:
            self._restored[session_id] = Session(session_id, created_at, created_at)
        elif session_id in self._restored:
            session.created_at = min(session.created_at, created_at)
            session.used_at = max(session.used_at, created_at)

    def end_restoring(self) -> None:
        """All blocks of earlier runs are known: from now on their sessions end when it is time."""
        sessions = sorted((*self._restored.values(), *self._common.values()), key=_used_at)
        self._restored.clear()
        self._common = OrderedDict((one.session_id, one) for one in sessions)

    def end(self, session_id: SessionId) -> Session | None:
        """Forget a session; returns what it was."""
        self._ended[session_id] = None
        self._ended.move_to_end(session_id)
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        session = self.get(session_id)
        for sessions in (self._common, self._own, self._restored):
            sessions.pop(session_id, None)
        return session

    def prune(self, has_blocks: Callable[[SessionId], bool]) -> None:
        """Forget some sessions without block or open request, where there are many."""
        if not self._unpruned:
            if len(self) <= self._prune_at:
                return
            self._unpruned = [one.session_id for one in self.all()]
        for session_id in self._unpruned[-_PRUNED_AT_ONCE:]:
            session = self.get(session_id)
            if session is not None and not session.num_open and not has_blocks(session_id):
                for sessions in (self._common, self._own, self._restored):
                    sessions.pop(session_id, None)
        del self._unpruned[-_PRUNED_AT_ONCE:]
        if not self._unpruned:
            self._prune_at = max(_FEWEST_PRUNED, 2 * len(self))

    def set_ttl(self, session: Session, ttl_s: float, now_s: float) -> None:
        """Let a session, which is used by this, end so long after its last use."""
        self._common.pop(session.session_id, None)
        self._restored.pop(session.session_id, None)
        self._own[session.session_id] = session
        session.ttl_s, session.used_at = ttl_s, now_s
        self._own_end = min(self._own_end, self.ends_at(session))

    def has_ended(self, session_id: SessionId) -> bool:
        """Whether it ended a while ago and did not begin again."""
        return session_id in self._ended

    def ends_at(self, session: Session) -> float:
        """When it ends if it is not used any more."""
        return session.used_at + (self._ttl_s if session.ttl_s is None else session.ttl_s)

    @property
    def next_end(self) -> float:
        """No session ends of itself before this time."""
        for session in self._common.values():
            return min(self.ends_at(session), self._own_end)
        return self._own_end

    def due(self, now_s: float) -> list[SessionId]:
        """Sessions that nobody has used for too long; those with open requests are in use."""
        due = []
        for session in self._common.values():
            if self.ends_at(session) > now_s:
                break
            due.append(session)
        if self._own_end <= now_s:
            due += [one for one in self._own.values() if self.ends_at(one) <= now_s]
            left = (self.ends_at(one) for one in self._own.values())
            self._own_end = min((end for end in left if end > now_s), default=inf)
        for session in due:
            if session.num_open:
                self.use(session.session_id, now_s)
                self._own_end = min(self._own_end, self.ends_at(session))
        return [one.session_id for one in due if not one.num_open]


def _used_at(session: Session) -> float:
    return session.used_at
