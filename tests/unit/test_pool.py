"""Who holds which block, and that a pool notices when its books are wrong."""

from collections.abc import Callable

import pytest

from kvkeep.blocks import BlockPool, BlockState
from kvkeep.policies import LRU
from kvkeep.spec import BlockId


def blocks(*numbers: int) -> list[BlockId]:
    """Blocks by number."""
    return [BlockId(number) for number in numbers]


def pool_of(num_blocks: int) -> BlockPool:
    """An empty pool."""
    return BlockPool(num_blocks, LRU())


def allocate(pool: BlockPool, num_blocks: int) -> list[BlockId]:
    """Blocks that must be there."""
    allocation = pool.allocate(num_blocks)
    assert allocation is not None
    return allocation.blocks


def sealed(pool: BlockPool, num_blocks: int) -> list[BlockId]:
    """Blocks with content that nobody holds."""
    new = allocate(pool, num_blocks)
    pool.seal(new)
    pool.release(new)
    return new


def counts(pool: BlockPool) -> tuple[int, int, int]:
    """Free, evictable and held blocks."""
    return pool.num_free, pool.num_evictable, pool.num_held


def test_a_new_pool_is_free() -> None:
    """Every block can be handed out."""
    pool = pool_of(3)

    assert counts(pool) == (3, 0, 0)
    assert pool.num_available == 3
    assert pool.check([0, 0, 0]) == []


def test_allocated_blocks_are_distinct_and_held() -> None:
    """Each block is handed out once, to be filled."""
    pool = pool_of(4)

    first, second = allocate(pool, 2), allocate(pool, 2)

    assert sorted(first + second) == [0, 1, 2, 3]
    assert all(pool.state(block) is BlockState.FILLING for block in first + second)
    assert all(pool.num_holders(block) == 1 for block in first + second)
    assert counts(pool) == (0, 0, 4)


def test_allocating_without_room_changes_nothing() -> None:
    """Neither a free block nor evictable content is touched when both together are too few."""
    pool = pool_of(3)
    kept = sealed(pool, 1)
    allocate(pool, 1)

    assert pool.allocate(3) is None
    assert counts(pool) == (1, 1, 1)
    assert pool.state(kept[0]) is BlockState.SEALED


def test_a_released_filling_block_is_free() -> None:
    """Without a key there is no hope of reuse."""
    pool = pool_of(2)
    new = allocate(pool, 2)

    assert pool.release(new) == new
    assert counts(pool) == (2, 0, 0)
    assert pool.state(new[0]) is BlockState.FREE


def test_a_released_sealed_block_waits_for_reuse() -> None:
    """Sealed content stays, evictable, and can be acquired again."""
    pool = pool_of(2)
    kept = sealed(pool, 1)
    assert counts(pool) == (1, 1, 0)

    pool.acquire(kept)

    assert counts(pool) == (1, 0, 1)
    assert pool.state(kept[0]) is BlockState.SEALED


def test_free_blocks_are_used_before_content_is_evicted() -> None:
    """Eviction starts where the free blocks end, and is reported."""
    pool = pool_of(3)
    kept = sealed(pool, 2)

    free_first = pool.allocate(1)
    then_evicted = pool.allocate(1)

    assert free_first is not None
    assert free_first.evicted == []
    assert then_evicted is not None
    # Released together, so the leaf goes before its parent.
    assert then_evicted.blocks == then_evicted.evicted == [kept[1]]


def test_a_held_block_is_never_evicted() -> None:
    """A block with a holder is not handed out, however full the pool is."""
    pool = pool_of(2)
    kept = sealed(pool, 2)
    pool.acquire(kept[:1])

    assert allocate(pool, 1) == kept[1:]
    assert pool.allocate(1) is None


def test_the_last_holder_decides() -> None:
    """A block held twice stays held when one of its holders goes."""
    pool = pool_of(1)
    block = allocate(pool, 1)
    pool.acquire(block)

    assert pool.release(block) == []
    assert counts(pool) == (0, 0, 1)
    assert pool.release(block) == block
    assert counts(pool) == (1, 0, 0)


def test_releasing_twice_is_noticed() -> None:
    """Nobody can give back what nobody holds."""
    pool = pool_of(1)
    block = allocate(pool, 1)
    pool.release(block)

    with pytest.raises(AssertionError, match="released twice"):
        pool.release(block)


def test_unsealing_frees_what_nobody_holds() -> None:
    """Forgotten content is free at once, or private to its holders until they go."""
    pool = pool_of(2)
    kept = sealed(pool, 2)
    pool.acquire(kept[:1])

    assert pool.unseal(kept) == kept[1:]
    assert pool.state(kept[0]) is BlockState.FILLING
    assert counts(pool) == (1, 0, 1)
    assert pool.release(kept[:1]) == kept[:1]
    assert counts(pool) == (2, 0, 0)


def test_the_block_used_last_is_handed_out_first() -> None:
    """Free blocks are a stack."""
    pool = pool_of(8)
    used = allocate(pool, 3)
    pool.release(used)

    assert set(allocate(pool, 3)) == set(used)


def _lose_a_free_block(pool: BlockPool) -> None:
    pool._free.pop()


def _double_a_free_block(pool: BlockPool) -> None:
    pool._free.append(pool._free[-1])


def _miscount_holders(pool: BlockPool) -> None:
    pool._num_holders[1] += 1


def _miscount_holders_of_a_free_block(pool: BlockPool) -> None:
    pool._num_holders[pool._free[0]] = 1


def _seal_behind_its_back(pool: BlockPool) -> None:
    pool._states[pool._free[0]] = BlockState.SEALED


def _free_a_held_block(pool: BlockPool) -> None:
    pool._free.append(BlockId(1))


def _forget_evictable(pool: BlockPool) -> None:
    pool._policy.forget(blocks(0))


def _make_a_held_block_evictable(pool: BlockPool) -> None:
    pool._policy.insert(blocks(1))


def _invent_an_evictable_block(pool: BlockPool) -> None:
    pool._policy.insert(blocks(99))


@pytest.mark.parametrize(
    "damage",
    [
        _lose_a_free_block,
        _double_a_free_block,
        _miscount_holders,
        _miscount_holders_of_a_free_block,
        _seal_behind_its_back,
        _free_a_held_block,
        _forget_evictable,
        _make_a_held_block_evictable,
        _invent_an_evictable_block,
    ],
)
def test_a_damaged_pool_is_noticed(damage: Callable[[BlockPool], None]) -> None:
    """Whatever drifts by hand is reported by check."""
    pool = pool_of(4)
    assert allocate(pool, 2) == blocks(0, 1)
    pool.seal(blocks(0))
    pool.release(blocks(0))
    assert pool.check([0, 1, 0, 0]) == []

    damage(pool)

    assert pool.check([0, 1, 0, 0]) != []


def test_a_lease_that_nobody_counted_is_noticed() -> None:
    """Holders are compared with the leases there are."""
    pool = pool_of(2)
    allocate(pool, 1)

    assert pool.check([1, 0]) == []
    assert len(pool.check([0, 0])) == 1
    assert len(pool.check([2, 0])) == 1
