"""Who holds which block: reference counts and states of the places on the device.

    allocate          seal             release (last holder)
    FREE ──────> FILLING ──────> SEALED ───────────────> SEALED, evictable ──> FREE (evict)
                    │ release (last holder)                      │ acquire
                    └──────────> FREE                            └──────────> SEALED

A sealed block without holders stays, evictable, in the hope of reuse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from kvkeep.policies import EvictionPolicy, Ranked
from kvkeep.spec import BlockId

__all__ = ["Allocation", "BlockPool", "BlockState"]


class BlockState(IntEnum):
    """The life of a block."""

    FREE = 0
    FILLING = 1
    SEALED = 2


@dataclass(frozen=True, slots=True)
class Allocation:
    """Blocks handed out, and those among them whose old content was evicted for it."""

    blocks: list[BlockId]
    evicted: list[BlockId]


class BlockPool:
    """A fixed number of blocks: every block is free, held by someone, or evictable."""

    def __init__(self, num_blocks: int, policy: EvictionPolicy[BlockId]) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._policy = policy if isinstance(policy, Ranked) else Ranked(policy)
        self._num_holders = [0] * num_blocks
        self._states = [BlockState.FREE] * num_blocks
        # A stack: the places used last, still warm in the processor's caches, are used first.
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Sealed blocks that nobody holds."""
        return len(self._policy)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._policy)

    @property
    def num_held(self) -> int:
        """Blocks that at least one lease holds."""
        return self.num_blocks - self.num_available

    def is_place(self, _number: int, _block: BlockId) -> bool:
        """Whether the block may be what a table has at a number; SplitPool makes a difference."""
        return True

    def counts(self, blocks: Sequence[BlockId]) -> tuple[int, ...]:
        """How many of the blocks are of each part, here the only one."""
        return (len(blocks),)

    def has_room(self, num_blocks: int, *, with_first: bool = False) -> bool:
        """Whether `allocate` has so many blocks."""
        return num_blocks <= self.num_available

    def has_free(self, *, with_first: bool = False) -> bool:
        """Whether `allocate` has a block without evicting another, for number 0 if `with_first`."""
        return bool(self._free)

    def state(self, block: BlockId) -> BlockState:
        """The block's state."""
        return self._states[block]

    def num_holders(self, block: BlockId) -> int:
        """Leases that hold the block."""
        return self._num_holders[block]

    def allocate(self, num_blocks: int, *, with_first: bool = False) -> Allocation | None:
        """Hand out blocks for filling, free ones first; evicts as many as are still missing.

        `with_first` says that the first of them is for number 0 of a table, which is as good as any
        here. Returns None and changes nothing when there is no room.
        """
        num_from_free = min(num_blocks, len(self._free))
        evicted = self._policy.evict(num_blocks - num_from_free)
        if evicted is None:
            return None
        at = len(self._free) - num_from_free
        blocks = self._free[at:][::-1] + evicted
        del self._free[at:]
        self.num_evictions += len(evicted)
        for block in blocks:
            self._num_holders[block] = 1
            self._states[block] = BlockState.FILLING
        return Allocation(blocks, evicted)

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        """Add a holder to each block; none may be free."""
        num_holders = self._num_holders
        reused = []
        for block in blocks:
            if not num_holders[block]:
                reused.append(block)
            num_holders[block] += 1
        self._policy.remove(reused)

    def release(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Take a holder, in chain order, from each block; returns those that became free."""
        num_holders, states = self._num_holders, self._states
        evictable: list[BlockId] = []
        freed: list[BlockId] = []
        for block in blocks:
            assert num_holders[block] > 0, f"block {block} was released twice"
            num_holders[block] -= 1
            if not num_holders[block]:
                (evictable if states[block] is BlockState.SEALED else freed).append(block)
        self._policy.insert(evictable)
        self._make_free(freed)
        return freed

    def rank(self, blocks: Sequence[BlockId], rank: int) -> None:
        """Let sealed blocks go before all of a higher rank, until their content goes."""
        self._policy.rank(blocks, rank)

    def seal(self, blocks: Sequence[BlockId]) -> None:
        """FILLING -> SEALED: the content is complete and has a key."""
        for block in blocks:
            assert self._states[block] is BlockState.FILLING
            self._states[block] = BlockState.SEALED

    def unseal(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Forget the content of sealed blocks; returns those that became free.

        A block still held stays with its holders, as their private one.
        """
        self._policy.forget(blocks)
        for block in blocks:
            assert self._states[block] is BlockState.SEALED
            self._states[block] = BlockState.FILLING
        freed = [block for block in blocks if not self._num_holders[block]]
        self._make_free(freed)
        return freed

    def _make_free(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            self._states[block] = BlockState.FREE
        self._free += blocks

    def check(self, expected_holders: Sequence[int]) -> list[str]:
        """What is wrong, in words, given how many leases hold each block; empty if all is well."""
        problems = []
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("a block is twice in the free list")
        for number, (holders, state) in enumerate(
            zip(self._num_holders, self._states, strict=True)
        ):
            block = BlockId(number)
            if holders != expected_holders[block]:
                problems.append(
                    f"block {block} counts {holders} holders, "
                    f"{expected_holders[block]} leases hold it"
                )
            if (state is BlockState.FREE) != (block in free):
                problems.append(f"block {block} is {state.name} but the free list disagrees")
            if (state is BlockState.SEALED and not holders) != (block in self._policy):
                problems.append(f"block {block} is {state.name} but the policy disagrees")
            if holders and state is BlockState.FREE:
                problems.append(f"block {block} is free and held")
        num_evictable = sum(
            state is BlockState.SEALED and not holders
            for holders, state in zip(self._num_holders, self._states, strict=True)
        )
        if num_evictable != len(self._policy):
            problems.append(f"the policy has {len(self._policy)} items, {num_evictable} evictable")
        return problems
