"""The prompts that were sent lately, bounded in number and bytes; one tenant's do not crowd out others'."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from heapq import nlargest

from kvkeep.blocks import Namespace
from kvkeep.cache.explain.compare import TOKEN_BYTES, common_tokens
from kvkeep.cache.explain.miss import Outline, Sent
from kvkeep.spec import BlockKey

__all__ = ["Earlier", "PromptLog"]

# Sessions are remembered apart from prompts, since thousands may share one.
_MOST_SESSIONS = 8192


@dataclass(frozen=True, slots=True)
class Earlier:
    """A prompt that was sent before, and how many tokens a new one begins with as it does."""

    tokens: bytes
    outline: Outline
    namespace: Namespace
    num_common: int


@dataclass(slots=True, eq=False)
class _Record:
    root: BlockKey
    tokens: bytes
    outline: Outline
    namespace: Namespace
    owner: str | None
    # Who has sent it; `is_shared` when somebody did without a session.
    sessions: set[str] = field(default_factory=set)
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class _Turn:
    """The last prompt of a session: the first `num_bytes` of a record, which may have grown since."""

    record: _Record
    num_bytes: int
    outline: Outline


class PromptLog:
    """Prompts by namespace; one that another continues is kept as part of that one."""

    def __init__(self, *, max_prompts: int, max_bytes: int) -> None:
        assert max_prompts > 0
        self._max_prompts = max_prompts
        self._max_bytes = max_bytes
        self._num_bytes = 0
        # In the order of their last use, the longest ago first.
        self._records: OrderedDict[int, _Record] = OrderedDict()
        self._session_to_turn: OrderedDict[tuple[BlockKey, str], _Turn] = OrderedDict()
        self._owner_to_sessions: Counter[str | None] = Counter()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tokens that are kept."""
        return self._num_bytes

    def add(self, sent: Sent, num_tokens: int) -> None:
        """Remember the first tokens of a prompt; without room the oldest go of who has the most there."""
        tokens = sent.chain.packed(0, num_tokens)
        if not 0 < len(tokens) <= self._max_bytes:
            return
        record = self._continued_by(sent, tokens)
        if len(tokens) >= len(record.tokens):
            self._num_bytes += len(tokens) - len(record.tokens)
            record.tokens, record.outline = tokens, sent.outline
        self._records[id(record)] = record
        self._records.move_to_end(id(record))
        if sent.session is None:
            record.is_shared = True
        else:
            self._turn(sent, sent.session, record, len(tokens))
        while len(self._records) > self._max_prompts:
            self._forget_one(Counter(one.owner for one in self._records.values()))
        while self._num_bytes > self._max_bytes:
            owner_to_bytes = Counter[str | None]()
            for one in self._records.values():
                owner_to_bytes[one.owner] += len(one.tokens)
            self._forget_one(owner_to_bytes)

    def packed(self, root: BlockKey) -> list[bytes]:
        """The tokens of the prompts of a namespace, the newest first."""
        return [one.tokens for one in reversed(self._records.values()) if one.root == root]

    def of_session(self, root: BlockKey, session: str, tokens: bytes) -> Earlier | None:
        """The last prompt of a session, compared with `tokens`."""
        turn = self._session_to_turn.get((root, session))
        if turn is None:
            return None
        earlier = turn.record.tokens[: turn.num_bytes]
        common = common_tokens(tokens, earlier)
        return Earlier(earlier, turn.outline, turn.record.namespace, common)

    def nearest(self, root: BlockKey, tokens: bytes, count: int) -> list[Earlier]:
        """The prompts of a namespace that begin most like `tokens`, best first, of equals the newest."""
        records = [one for one in reversed(self._records.values()) if one.root == root]
        best: list[tuple[int, int]] = []
        floor, beginning = 0, b""
        for order, record in enumerate(records):
            # What cannot be among the best is seen in one comparison.
            if not record.tokens.startswith(beginning):
                continue
            common = floor + common_tokens(tokens, record.tokens, one_at=floor, other_at=floor)
            best = nlargest(count, [*best, (common, -order)])
            if len(best) == count and best[-1][0] > floor:
                floor = best[-1][0]
                beginning = tokens[: floor * TOKEN_BYTES]
        found = [(common, records[-negative]) for common, negative in best]
        return [Earlier(one.tokens, one.outline, one.namespace, n) for n, one in found]

    def elsewhere(self, sent: Sent, tokens: bytes) -> Earlier | None:
        """A prompt of the same owner in another namespace that shares the first block, the newest."""
        root, size = sent.chain.root, sent.chain.block_size * TOKEN_BYTES
        for one in reversed(self._records.values()):
            is_told = sent.owner is not None and one.owner == sent.owner
            if is_told and one.root != root and one.tokens.startswith(tokens[:size]):
                common = common_tokens(tokens, one.tokens)
                return Earlier(one.tokens, one.outline, one.namespace, common)
        return None

    def forget(self, root: BlockKey | None, session: str | None = None) -> None:
        """Forget the prompts of a namespace (None: of all), or those that only one of its sessions sent."""
        for record in [one for one in self._records.values() if root in (None, one.root)]:
            if session is not None:
                record.sessions.discard(session)
            if session is None or not (record.sessions or record.is_shared):
                self._forget(record)
        if root is not None and session is not None:
            self._drop_turn((root, session))

    def _continued_by(self, sent: Sent, tokens: bytes) -> _Record:
        """The record that these tokens continue, or are part of; a new one where there is none."""
        for record in reversed(self._records.values()):
            if record.root == sent.chain.root and record.owner == sent.owner:
                is_part = record.tokens.startswith(tokens) or tokens.startswith(record.tokens)
                if is_part:
                    return record
        return _Record(sent.chain.root, b"", sent.outline, sent.namespace, sent.owner)

    def _turn(self, sent: Sent, session: str, record: _Record, num_bytes: int) -> None:
        name = (sent.chain.root, session)
        record.sessions.add(session)
        is_new = name not in self._session_to_turn
        self._session_to_turn[name] = _Turn(record, num_bytes, sent.outline)
        self._session_to_turn.move_to_end(name)
        self._owner_to_sessions[record.owner] += is_new
        if len(self._session_to_turn) > _MOST_SESSIONS:
            self._forget_turn()

    def _forget_one(self, owner_to_share: Counter[str | None]) -> None:
        """Forget the oldest prompt of the owner who has the most."""
        ((owner, _),) = owner_to_share.most_common(1)
        self._forget(next(one for one in self._records.values() if one.owner == owner))

    def _forget_turn(self) -> None:
        """Forget the longest unused session of the owner who has the most; its prompt stays."""
        ((owner, _),) = self._owner_to_sessions.most_common(1)
        turns = self._session_to_turn.items()
        name, turn = next((name, one) for name, one in turns if one.record.owner == owner)
        self._drop_turn(name)
        turn.record.sessions.discard(name[1])
        turn.record.is_shared = True

    def _drop_turn(self, name: tuple[BlockKey, str]) -> None:
        turn = self._session_to_turn.pop(name, None)
        if turn is not None:
            self._owner_to_sessions[turn.record.owner] -= 1

    def _forget(self, record: _Record) -> None:
        del self._records[id(record)]
        self._num_bytes -= len(record.tokens)
        for session in record.sessions:
            turn = self._session_to_turn.get((record.root, session))
            if turn is not None and turn.record is record:
                self._drop_turn((record.root, session))
