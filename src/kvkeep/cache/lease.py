"""What a running request holds: its tokens, its blocks, and what is still to be computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvkeep.blocks import TokenChain
from kvkeep.cache.decision import Decision
from kvkeep.cache.lifetimes import Claim
from kvkeep.spec import BlockId, BlockKey, Span

__all__ = ["BlockTable", "Lease", "PendingLoad"]


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """A block on its way from the tier `source` to number `number` of a group's table."""

    group: int
    number: int
    source: str


class BlockTable:
    """The blocks of one request in one KV group, by number.

    None where the request needs no block: out of the window, or not computed yet. Blocks in
    `read_only` lie inside a gap although this group knows them: another group does not, so their
    tokens are computed again but not written here.
    """

    __slots__ = ("blocks", "first_held", "read_only")

    def __init__(self) -> None:
        self.blocks: list[BlockId | None] = []
        self.read_only: set[int] = set()
        self.first_held = 0

    def held(self) -> list[BlockId]:
        """All blocks held, in chain order."""
        return [block for block in self.blocks if block is not None]

    def place(self, number: int) -> BlockId:
        """The block held at `number`."""
        block = self.blocks[number]
        assert block is not None
        return block

    def grow(self, num_blocks: int) -> None:
        """Make room for block numbers below `num_blocks`."""
        self.blocks.extend([None] * (num_blocks - len(self.blocks)))

    def cut(self, num_full: int, num_blocks: int) -> list[BlockId]:
        """Keep block numbers below `num_blocks`, `num_full` of them full; returns those let go."""
        dropped = [block for block in self.blocks[num_blocks:] if block is not None]
        del self.blocks[num_blocks:]
        self.read_only = {at for at in self.read_only if at < num_full}
        return dropped

    def fork(self) -> "BlockTable":
        """An independent table of the same blocks."""
        other = BlockTable()
        other.blocks = self.blocks[:]
        other.read_only = set(self.read_only)
        other.first_held = self.first_held
        return other


class Lease:
    """Blocks held for one request. Made by `KVCache.reserve`; closes once, on every path.

    `gaps` are the positions still to be computed, in order; a step computes spans from their front.
    In `states` are the places of the running recurrent states, one for each recurrent group. `loads` are the
    blocks that are still on their way, `loaded` says by number where those that came are from, and `failed`
    has the cause of those that did not: then the lease is to be released, and reserved anew. `restore_s` is
    from the start of the first load to the end of the last one so far.
    """

    def __init__(
        self,
        chain: TokenChain,
        tables: list[BlockTable],
        gaps: Sequence[Span],
        *,
        publishes: bool,
        claim: Claim,
        close: Callable[["Lease"], None],
    ) -> None:
        self.chain = chain
        self.tables = tables
        self.gaps = list(gaps)
        self.states: dict[int, BlockId] = {}
        # For each group the blocks that were known when the lease was made.
        self.reused: list[set[BlockId]] = [set() for _ in tables]
        self.decision: Decision | None = None
        self.loads: set[PendingLoad] = set()
        self.loaded: dict[int, str] = {}
        self.failed: dict[PendingLoad, str] = {}
        self.restore_s = 0.0
        self._loads_began_s: float | None = None
        self.claim = claim
        # Whether the claim is this lease's alone, and ends with it.
        self.owns_claim = False
        self._publishes = publishes
        self.reused_tokens = len(chain) - sum(len(gap) for gap in gaps)
        self.is_open = True
        self._close = close

    @property
    def publishes(self) -> bool:
        """Whether others find what the request computes; never again once its claim is void."""
        return self._publishes and self.claim.publishes

    @publishes.setter
    def publishes(self, publishes: bool) -> None:
        """Say whether others are to find it."""
        self._publishes = publishes

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed."""
        return sum(len(gap) for gap in self.gaps)

    @property
    def next_position(self) -> int:
        """The first position still to be computed, or the length when there is none."""
        return self.gaps[0].start if self.gaps else len(self.chain)

    @property
    def runnable_gaps(self) -> list[Span]:
        """The gaps, as far as everything before them is here or computed with them."""
        if not self.loads:
            return self.gaps
        limit = min(load.number for load in self.loads) * self.chain.block_size
        return [Span(gap.start, min(gap.stop, limit)) for gap in self.gaps if gap.start < limit]

    def begin_load(self, load: PendingLoad, now_s: float) -> None:
        """A block is on its way."""
        self.loads.add(load)
        if self._loads_began_s is None:
            self._loads_began_s = now_s

    def finish_load(self, load: PendingLoad, failure: str | None, at_s: float) -> None:
        """A block has arrived at that time, or is known not to."""
        assert self._loads_began_s is not None
        self.loads.remove(load)
        self.restore_s = max(self.restore_s, at_s - self._loads_began_s)
        if failure is None:
            self.loaded[load.number] = load.source
            self.reused[load.group].add(self.tables[load.group].place(load.number))
        else:
            self.failed[load] = failure

    def append(self, token_ids: Sequence[int]) -> None:
        """Add tokens to be computed behind the last one."""
        start = len(self.chain)
        self.chain.append(token_ids)
        stop = len(self.chain)
        if start == stop:
            return
        if self.gaps and self.gaps[-1].stop == start:
            start = self.gaps.pop().start
        self.gaps.append(Span(start, stop))

    def advance(self, spans: Sequence[Span]) -> None:
        """Take computed spans from the front of the gaps."""
        for span in spans:
            gap = self.gaps[0]
            assert gap.start == span.start
            assert span.stop <= gap.stop
            if span.stop == gap.stop:
                self.gaps.pop(0)
            else:
                self.gaps[0] = Span(span.stop, gap.stop)

    def will_publish(self, block: int, key: BlockKey) -> bool:
        """Whether this request is about to compute and publish exactly this block."""
        keys = self.chain.keys
        if not self.publishes or block >= len(keys) or keys[block] != key:
            return False
        # A block is published with its last token; its first ones may be computed already.
        last = (block + 1) * self.chain.block_size - 1
        return any(gap.start <= last < gap.stop for gap in self.gaps)

    def release(self) -> None:
        """Give everything back; sealed blocks stay in the cache. Calling it again does nothing."""
        if self.is_open:
            self.is_open = False
            self._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
