"""Two pools as one: the blocks of a group, and those for the first block of every request.

Ids tell them apart: those below `rest.num_blocks` are of `rest`, the others of `first`.
"""

from collections.abc import Sequence

from kvkeep.blocks.pool import Allocation, BlockPool, BlockState
from kvkeep.spec import BlockId

__all__ = ["SplitPool"]


class SplitPool:
    """A BlockPool of two parts, each of which evicts for itself; see there for the methods."""

    def __init__(self, rest: BlockPool, first: BlockPool) -> None:
        self._rest = rest
        self._first = first

    @property
    def num_blocks(self) -> int:
        """Blocks of both parts; ids are below."""
        return self._rest.num_blocks + self._first.num_blocks

    def state(self, block: BlockId) -> BlockState:
        """The block's state."""
        pool, own = self._locate(block)
        return pool.state(own)

    def num_holders(self, block: BlockId) -> int:
        """Leases that hold the block."""
        pool, own = self._locate(block)
        return pool.num_holders(own)

    def is_place(self, number: int, block: BlockId) -> bool:
        """Whether the block may be what a table has at `number`."""
        return (number == 0) == (block >= self._rest.num_blocks)

    def has_room(self, num_blocks: int, *, with_first: bool = False) -> bool:
        """Whether `allocate` has so many blocks."""
        num_rest = num_blocks - with_first
        return self._rest.has_room(num_rest) and (not with_first or self._first.has_room(1))

    def has_free(self, *, with_first: bool = False) -> bool:
        """Whether `allocate` has a block without evicting another, for number 0 if `with_first`."""
        return (self._first if with_first else self._rest).num_free > 0

    def allocate(self, num_blocks: int, *, with_first: bool = False) -> Allocation | None:
        """Hand out blocks for filling; `with_first` the first of them is for number 0 of a table."""
        if not self.has_room(num_blocks, with_first=with_first):
            return None
        rest = self._rest.allocate(num_blocks - with_first)
        assert rest is not None
        if not with_first:
            return rest
        first = self._first.allocate(1)
        assert first is not None
        return Allocation(
            [*self._as_ids(first.blocks), *rest.blocks],
            [*self._as_ids(first.evicted), *rest.evicted],
        )

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        """Add a holder to each block; none may be free."""
        rest, first = self._split(blocks)
        self._rest.acquire(rest)
        self._first.acquire(first)

    def release(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Take a holder, in chain order, from each block; returns those that became free."""
        rest, first = self._split(blocks)
        return [*self._as_ids(self._first.release(first)), *self._rest.release(rest)]

    def rank(self, blocks: Sequence[BlockId], rank: int) -> None:
        """Let sealed blocks go before all of a higher rank of their part."""
        rest, first = self._split(blocks)
        self._rest.rank(rest, rank)
        self._first.rank(first, rank)

    def seal(self, blocks: Sequence[BlockId]) -> None:
        """FILLING -> SEALED: the content is complete and has a key."""
        rest, first = self._split(blocks)
        self._rest.seal(rest)
        self._first.seal(first)

    def unseal(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Forget the content of sealed blocks; returns those that became free."""
        rest, first = self._split(blocks)
        return [*self._as_ids(self._first.unseal(first)), *self._rest.unseal(rest)]

    def counts(self, blocks: Sequence[BlockId]) -> tuple[int, ...]:
        """How many of the blocks are of each part."""
        rest, first = self._split(blocks)
        return len(rest), len(first)

    def check(self, expected_holders: Sequence[int]) -> list[str]:
        """What is wrong, in words, given how many leases hold each block; empty if all is well."""
        num_rest = self._rest.num_blocks
        problems = self._rest.check(expected_holders[:num_rest])
        others = self._first.check(expected_holders[num_rest:])
        return [*problems, *(f"of the first blocks: {problem}" for problem in others)]

    def _locate(self, block: BlockId) -> tuple[BlockPool, BlockId]:
        num_rest = self._rest.num_blocks
        if block < num_rest:
            return self._rest, block
        return self._first, BlockId(block - num_rest)

    def _split(self, blocks: Sequence[BlockId]) -> tuple[list[BlockId], list[BlockId]]:
        """The blocks of each part, numbered as it does."""
        num_rest = self._rest.num_blocks
        return (
            [block for block in blocks if block < num_rest],
            [BlockId(block - num_rest) for block in blocks if block >= num_rest],
        )

    def _as_ids(self, first: Sequence[BlockId]) -> list[BlockId]:
        return [BlockId(block + self._rest.num_blocks) for block in first]
