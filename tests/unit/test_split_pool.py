"""A pool in two parts: number 0 of every table lies in one of its own."""

import pytest

from kvkeep.blocks import BlockPool, BlockState, SplitPool
from kvkeep.policies import LRU
from kvkeep.spec import BlockId

NUM_REST, NUM_FIRST = 4, 2
FIRST_IDS = {NUM_REST, NUM_REST + 1}


@pytest.fixture
def parts() -> tuple[BlockPool, BlockPool]:
    """Four blocks, and two first ones."""
    return BlockPool(NUM_REST, LRU()), BlockPool(NUM_FIRST, LRU())


@pytest.fixture
def pool(parts: tuple[BlockPool, BlockPool]) -> SplitPool:
    """Both as one."""
    return SplitPool(*parts)


def allocate(pool: SplitPool, num_blocks: int, *, with_first: bool = False) -> list[BlockId]:
    """Blocks that must be there."""
    allocation = pool.allocate(num_blocks, with_first=with_first)
    assert allocation is not None
    return allocation.blocks


def sealed(pool: SplitPool, num_blocks: int, *, with_first: bool = False) -> list[BlockId]:
    """Blocks with content that nobody holds."""
    blocks = allocate(pool, num_blocks, with_first=with_first)
    pool.seal(blocks)
    assert pool.release(blocks) == []
    return blocks


def test_the_first_block_comes_first_and_from_its_own_part(pool: SplitPool) -> None:
    """All others come from the rest; ids of the two do not meet."""
    first, *others = allocate(pool, 3, with_first=True)

    assert first in FIRST_IDS
    assert FIRST_IDS.isdisjoint([*others, *allocate(pool, 2)])
    assert pool.num_blocks == NUM_REST + NUM_FIRST
    assert [pool.state(block) for block in (first, *others)] == [BlockState.FILLING] * 3
    assert [pool.is_place(0, first), pool.is_place(1, first)] == [True, False]
    assert [pool.is_place(0, others[0]), pool.is_place(1, others[0])] == [False, True]


def test_room_in_one_part_is_none_in_the_other(
    pool: SplitPool, parts: tuple[BlockPool, BlockPool]
) -> None:
    """Where one of both has no room nothing is taken from either, and nothing evicted."""
    kept = sealed(pool, 3, with_first=True)
    allocate(pool, 1, with_first=True)

    assert pool.has_room(5, with_first=True)
    assert not pool.has_room(5)
    assert pool.allocate(5) is None
    assert pool.allocate(6, with_first=True) is None
    allocate(pool, 1, with_first=True)
    assert not pool.has_room(1, with_first=True)
    assert pool.allocate(1, with_first=True) is None
    assert [pool.state(block) for block in kept[1:]] == [BlockState.SEALED] * 2
    assert [part.num_available for part in parts] == [4, 0]


def test_each_part_evicts_for_itself(pool: SplitPool, parts: tuple[BlockPool, BlockPool]) -> None:
    """The oldest first block goes for a first block, however much older others are."""
    old, new = sealed(pool, 2, with_first=True), sealed(pool, 2, with_first=True)

    allocation = pool.allocate(1, with_first=True)

    assert allocation is not None
    assert allocation.evicted == old[:1]
    assert allocation.blocks == old[:1]
    assert [part.num_evictions for part in parts] == [0, 1]
    assert pool.state(new[0]) is BlockState.SEALED
    assert pool.num_holders(new[0]) == 0


def test_holders_are_counted_in_both_parts(pool: SplitPool) -> None:
    """What is acquired, released and forgotten is told apart by id."""
    blocks = sealed(pool, 3, with_first=True)
    pool.acquire(blocks)
    pool.acquire(blocks[:1])

    assert [pool.num_holders(block) for block in blocks] == [2, 1, 1]
    assert pool.counts(blocks) == (2, 1)
    expected = [0] * pool.num_blocks
    for block, count in zip(blocks, (2, 1, 1), strict=True):
        expected[block] = count
    assert pool.check(expected) == []
    assert pool.unseal(blocks) == []
    assert pool.release(blocks) == blocks[1:]
    assert pool.release(blocks[:1]) == blocks[:1]
    assert pool.check([0] * pool.num_blocks) == []


def test_check_tells_of_both_parts(pool: SplitPool) -> None:
    """A wrong number of holders is found in either."""
    allocate(pool, 2, with_first=True)

    problems = pool.check([0] * pool.num_blocks)

    assert len(problems) == 2
    assert sum(problem.startswith("of the first blocks") for problem in problems) == 1
