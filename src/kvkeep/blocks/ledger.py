"""One KV group's blocks: the pool (who holds) and the index (what content) kept in step."""

from collections.abc import Callable, Sequence

from kvkeep.blocks.index import BlockIndex, Entry, PartialMatch
from kvkeep.blocks.pool import Allocation, BlockPool, BlockState
from kvkeep.blocks.split_pool import SplitPool
from kvkeep.spec import BlockId, BlockKey, GroupSpec

__all__ = ["BlockLedger", "OnEvict"]

OnEvict = Callable[[Sequence[BlockId], Sequence[Entry]], None]


class BlockLedger:
    """The only place where pool and index change, so that they cannot drift apart.

    With `first_blocks` number 0 of every table lies in that pool: see SplitPool. `on_evict` is called with
    what goes to make room, while its bytes are still in place.
    """

    def __init__(
        self,
        spec: GroupSpec,
        pool: BlockPool,
        first_blocks: BlockPool | None = None,
        *,
        on_evict: OnEvict | None = None,
    ) -> None:
        self.spec = spec
        self._on_evict = on_evict
        self.pool: BlockPool | SplitPool = (
            pool if first_blocks is None else SplitPool(pool, first_blocks)
        )
        self._index = BlockIndex()

    @property
    def num_sealed(self) -> int:
        """Blocks whose content has a key."""
        return len(self._index)

    def get(self, key: BlockKey) -> BlockId | None:
        """The block that holds the content `key` names."""
        return self._index.get(key)

    def find(self, keys: Sequence[BlockKey], contents: Sequence[bytes]) -> list[BlockId | None]:
        """The block of each key, None where there is none; changes nothing."""
        return self._index.find(keys, contents)

    def find_partial(self, parent: BlockKey, tokens: bytes) -> PartialMatch | None:
        """The content behind `parent` that shares the most leading tokens with `tokens`."""
        return self._index.find_partial(parent, tokens)

    def is_private(self, block: BlockId) -> bool:
        """Whether its only holder may write into the block."""
        pool = self.pool
        return pool.state(block) is BlockState.FILLING and pool.num_holders(block) == 1

    def allocate(self, num_blocks: int, *, with_first: bool = False) -> Allocation | None:
        """Blocks to fill, or None and no change; what had to be evicted for them is forgotten.

        `with_first` the first of them is for number 0 of a table.
        """
        allocation = self.pool.allocate(num_blocks, with_first=with_first)
        if allocation is not None and allocation.evicted:
            if self._on_evict is not None:
                self._on_evict(allocation.evicted, [self.entry_of(at) for at in allocation.evicted])
            self._index.discard(allocation.evicted)
        return allocation

    def seal(self, blocks: Sequence[BlockId], entries: Sequence[Entry]) -> None:
        """Publish filled blocks; one whose content is known already stays its holder's own."""
        new = [at for at, entry in enumerate(entries) if entry.key not in self._index]
        if len(new) != len(entries):
            blocks, entries = [blocks[at] for at in new], [entries[at] for at in new]
        self.pool.seal(blocks)
        self._index.add(blocks, entries)

    def forget(self, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Withdraw sealed content; returns the blocks that became free."""
        self._index.discard(blocks)
        return self.pool.unseal(blocks)

    def num_bytes(self, blocks: Sequence[BlockId], block_size: int) -> int:
        """What the blocks take."""
        classes = (self.spec, self.spec.of_first_blocks())
        counts = self.pool.counts(blocks)
        return sum(
            count * one.block_bytes(block_size) for count, one in zip(counts, classes, strict=False)
        )

    def sealed_blocks(self) -> list[BlockId]:
        """All blocks whose content has a key."""
        return self._index.blocks()

    def entry_of(self, block: BlockId) -> Entry:
        """The content of a sealed block."""
        entry = self._index.entry_of(block)
        assert entry is not None
        return entry

    def key_of(self, block: BlockId) -> BlockKey | None:
        """The name of what the block holds, None unless it is sealed."""
        return self._index.key_of(block)

    def check(self, expected_holders: Sequence[int]) -> list[str]:
        """What is wrong, in words, given how many leases hold each block; empty if all is well."""
        problems = self.pool.check(expected_holders) + self._index.check()
        sealed = set(self._index.blocks())
        for number in range(self.pool.num_blocks):
            block = BlockId(number)
            if (self.pool.state(block) is BlockState.SEALED) != (block in sealed):
                problems.append(f"block {block} is {self.pool.state(block).name}, index disagrees")
        return [f"group {self.spec.name}: {problem}" for problem in problems]
