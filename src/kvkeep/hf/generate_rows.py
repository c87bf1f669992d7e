"""The rows of a batch as leases: what `generate` does to a batch, done to pages.

Legend: B rows of the batch, T columns of one forward, S columns up to its end, N blocks of a row. A
column is a place in the padded batch; a position is a place in a row's own text, `column - pad`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.arena import ArenaGroups, RecurrentState
from kvkeep.blocks import TokenChain
from kvkeep.cache import KVCache, Lease
from kvkeep.hf.generate_call import Incoming
from kvkeep.spec import BlockKey, LayerKind

__all__ = ["NoRoomError", "Row", "RowLeases", "Started"]


class NoRoomError(Exception):
    """Not enough blocks for a forward; nothing has changed. The caller says it in the user's words."""


@dataclass(slots=True)
class Row:
    """One text: the padding columns before it and its lease, None before its first token."""

    pad: int
    lease: Lease | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens, those of a running forward included."""
        return 0 if self.lease is None else len(self.lease.chain)


@dataclass(frozen=True, slots=True)
class Started:
    """A forward that has its blocks: it computes columns `start <= c < stop` for the batch's rows.

    Rows with the same tokens are held once while it runs: row `b` of the batch is row `leaders[b]` of those
    held. `num_skipped` columns before `start` were found in the cache, which saved `reused_tokens`.
    """

    start: int
    stop: int
    num_skipped: int
    reused_tokens: int
    leaders: tuple[int, ...]
    before: tuple[int, ...]


class RowLeases:
    """One lease for each row of a batch; all rows have the same number of columns."""

    def __init__(self, cache: KVCache, arenas: ArenaGroups, root: BlockKey) -> None:
        self.cache = cache
        self.arenas = arenas
        self.rows: list[Row] = []
        self.num_columns = 0
        self.is_opaque = False
        self._root = root
        spec = cache.spec
        self._block_size = spec.block_size
        self._state_group = next(
            (at for at, g in enumerate(spec.groups) if g.kind is LayerKind.RECURRENT), None
        )

    @property
    def pads(self) -> tuple[int, ...]:
        """Padding columns of each row."""
        return tuple(row.pad for row in self.rows)

    def chain(self, token_ids: Sequence[int] = ()) -> TokenChain:
        """A text in the cache's namespace."""
        return TokenChain(self._root, self._block_size, token_ids)

    def release(self) -> None:
        """Let go of the batch; its full blocks stay in the cache."""
        rows, self.rows = self.rows, []
        self.num_columns = 0
        self.is_opaque = False
        for row in rows:
            if row.lease is not None:
                row.lease.release()

    # --- a forward ---------------------------------------------------------------------------------

    def begin(self, incoming: Incoming) -> Started:
        """Blocks for a forward's tokens, those shared that are known. Raises NoRoomError."""
        if not self.num_columns:
            self.rows = [Row(pad) for pad in incoming.pads]
        for row, pad in zip(self.rows, incoming.pads, strict=True):
            row.pad = pad
        if incoming.is_opaque:
            self._make_opaque()
        leaders, tokens = self._collapse(incoming)
        before = tuple(row.num_tokens for row in self.rows)
        skipped = self._share_known(tokens, incoming.max_skip) if incoming.max_skip else 0
        start = self.num_columns + skipped
        started = Started(
            start=start,
            stop=self.num_columns + incoming.num_columns,
            num_skipped=skipped,
            reused_tokens=sum(
                max(0, start - self.rows[at].pad) - before[at] for at in leaders if skipped
            ),
            leaders=leaders,
            before=before,
        )
        for row, count, new in zip(self.rows, before, tokens, strict=True):
            if not self._append(row, new[row.num_tokens - count :]):
                self.abort(started)
                raise NoRoomError
        return started

    def finish(self, started: Started) -> None:
        """All layers have written: publish full blocks and give every row its own lease again."""
        for row in self.rows:
            if row.lease is not None and row.lease.gaps:
                self.cache.commit(row.lease, tuple(row.lease.gaps))
        self.num_columns = started.stop
        if len(started.leaders) != len(self.rows):
            self.select(started.leaders)

    def abort(self, started: Started) -> None:
        """The forward did not finish: be as before it."""
        if not self.num_columns:
            self.release()
            return
        for row, count in zip(self.rows, started.before, strict=True):
            self._cut(row, count)
        if len(started.leaders) != len(self.rows):
            self.select(started.leaders)

    # --- what strategies do to a batch -------------------------------------------------------------

    def select(self, indices: Sequence[int]) -> None:
        """Make row `b` what row `indices[b]` was; copies share blocks. Raises NoRoomError."""
        old = self.rows
        for at in set(range(len(old))).difference(indices):
            self._cut(old[at], 0)
        self.rows = [old[at] for at in dict.fromkeys(indices)]
        taken: set[int] = set()
        selected = []
        for at in indices:
            row = old[at]
            if at in taken:
                row = Row(row.pad, None if row.lease is None else self._fork(row.lease))
                self.rows.append(row)
            taken.add(at)
            selected.append(row)
        self.rows = selected

    def truncate(self, num_columns: int) -> None:
        """Forget the columns from `num_columns` on."""
        for row in self.rows:
            row.pad = min(row.pad, num_columns)
            self._cut(row, num_columns - row.pad)
        self.num_columns = num_columns

    # --- recurrent states --------------------------------------------------------------------------

    def states(self, started: Started) -> list[RecurrentState]:
        """The state that each row of the batch continues from."""
        group = self._state_group
        assert group is not None
        leases = [self.rows[at].lease for at in started.leaders]
        arena = self.arenas.states[group]
        return [arena.load(lease.states[group]) for lease in leases if lease is not None]

    def is_checkpoint(self, started: Started) -> bool:
        """Whether the forward's end is a place where the cache keeps recurrent states."""
        return self._state_group is not None and started.stop % self._block_size == 0

    def keep_states(self, started: Started, states: Sequence[RecurrentState]) -> None:
        """Give the cache the batch's states at the forward's end, before `finish`."""
        group = self._state_group
        assert group is not None
        for at, state in zip(started.leaders, states, strict=True):
            lease = self.rows[at].lease
            assert lease is not None
            self.arenas.states[group].save(lease.states[group], state)

    # --- parts -------------------------------------------------------------------------------------

    def _make_opaque(self) -> None:
        """From here on the batch's K/V do not follow from known tokens, so nothing is published."""
        self.is_opaque = True
        for row in self.rows:
            if row.lease is not None:
                row.lease.publishes = False

    def _collapse(self, incoming: Incoming) -> tuple[tuple[int, ...], list[list[int]]]:
        """Hold rows of equal tokens once, so that beams and returned sequences share their prompt."""
        num_rows = len(self.rows)
        if incoming.is_opaque or num_rows == 1 or (self.num_columns and incoming.num_columns == 1):
            return tuple(range(num_rows)), incoming.tokens
        key_to_leader: dict[object, int] = {}
        leaders: list[int] = []
        tokens: list[list[int]] = []
        rows: list[Row] = []
        for row, new in zip(self.rows, incoming.tokens, strict=True):
            key = (*_fingerprint(row.lease), tuple(new))
            if key not in key_to_leader:
                key_to_leader[key] = len(rows)
                rows.append(row)
                tokens.append(new)
            else:
                self._cut(row, 0)
            leaders.append(key_to_leader[key])
        self.rows = rows
        return tuple(leaders), tokens

    def _share_known(self, tokens: Sequence[Sequence[int]], max_skip: int) -> int:
        """Replace leases by ones that share what is known; how many columns every row then has more."""
        chains = []
        for row, new in zip(self.rows, tokens, strict=True):
            chain = self.chain() if row.lease is None else row.lease.chain.fork()
            chain.append(new)
            chains.append(chain)
        start = self._known_columns(chains, self.num_columns + max_skip)
        if start <= self.num_columns:
            return 0
        shared: list[Lease | None] = []
        for row, chain in zip(self.rows, chains, strict=True):
            stop = start - row.pad
            lease = self.cache.reserve(_first(chain, stop + 1)) if stop > 0 else None
            shared.append(lease)
            # Making room for one row may have evicted what another one knew.
            if stop > 0 and (lease is None or lease.gaps[0].start != stop):
                for taken in shared:
                    if taken is not None:
                        taken.release()
                return 0
        for row, lease in zip(self.rows, shared, strict=True):
            if row.lease is not None:
                row.lease.release()
            row.lease = lease
        return start - self.num_columns

    def _known_columns(self, chains: Sequence[TokenChain], most: int) -> int:
        """The column before which every row's K/V, and the recurrent state there, are known."""
        column = most
        while column > self.num_columns:
            known = min(
                row.pad + self._known_tokens(chain, column - row.pad)
                for row, chain in zip(self.rows, chains, strict=True)
            )
            if known == column:
                break
            column = known
        return column

    def _known_tokens(self, chain: TokenChain, most: int) -> int:
        if most <= 0:
            return most
        return self.cache.gaps(_first(chain, most + 1))[0].start

    def _append(self, row: Row, tokens: Sequence[int]) -> bool:
        """Add tokens that this forward computes, with blocks to write them into; False without room."""
        if row.lease is None:
            if not tokens:
                return True
            row.lease = self.cache.reserve(self.chain(tokens), read=False, write=not self.is_opaque)
            if row.lease is None:
                return False
        elif tokens:
            row.lease.append(tokens)
        return not row.lease.gaps or self.cache.extend(row.lease, row.lease.gaps)

    def _fork(self, lease: Lease) -> Lease:
        copy = self.cache.fork(lease)
        if copy is None:
            self.release()
            raise NoRoomError
        return copy

    def _cut(self, row: Row, num_tokens: int) -> None:
        """Keep a row's first tokens; without any it has no lease."""
        if row.lease is None:
            return
        if num_tokens > 0:
            is_cut = self.cache.truncate(row.lease, num_tokens)
            assert is_cut, "every layer keeps all positions here, so nothing was left behind"
        else:
            row.lease.release()
            row.lease = None


def _first(chain: TokenChain, num_tokens: int) -> TokenChain:
    """A chain of the first tokens of `chain`."""
    first = chain.fork()
    first.truncate(min(num_tokens, len(chain)))
    return first


def _fingerprint(lease: Lease | None) -> tuple[object, ...]:
    """Equal for leases of equal tokens only."""
    if lease is None:
        return ()
    chain = lease.chain
    full = len(chain.keys)
    return (*chain.keys[-1:], full, tuple(chain.tokens(full * chain.block_size)))
