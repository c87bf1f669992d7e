"""From keys to blocks: exact hits, hits that end inside a block, and drift that is noticed."""

from collections.abc import Callable

import pytest

from kvkeep.blocks import BlockIndex, BlockLedger, BlockPool, Entry, TokenChain
from kvkeep.policies import LRU
from kvkeep.spec import BlockId, BlockKey
from tests.content_store import full

ROOT = BlockKey(b"r" * 32)


def chain_of(*token_ids: int) -> TokenChain:
    """A chain with blocks of four tokens."""
    return TokenChain(ROOT, 4, token_ids)


def entries_of(chain: TokenChain) -> list[Entry]:
    """What is indexed of a chain's full blocks."""
    contents = chain.block_content(0, len(chain.keys))
    return [
        Entry(key, chain.parent_key(number), content, chain.root)
        for number, (key, content) in enumerate(zip(chain.keys, contents, strict=True))
    ]


def index_of(*chains: TokenChain) -> BlockIndex:
    """An index of all blocks of the chains, numbered as they come."""
    index, number = BlockIndex(), 0
    for chain in chains:
        for entry in entries_of(chain):
            if entry.key not in index:
                index.add([BlockId(number)], [entry])
                number += 1
    return index


def find(index: BlockIndex, chain: TokenChain) -> list[BlockId | None]:
    """What the index has of a chain."""
    return index.find(chain.keys, chain.block_content(0, len(chain.keys)))


def test_what_was_added_is_found_and_nothing_else() -> None:
    """A chain's blocks are found as far as it has the same tokens."""
    index = index_of(chain_of(1, 2, 3, 4, 5, 6, 7, 8))

    assert find(index, chain_of(1, 2, 3, 4, 5, 6, 7, 8)) == [0, 1]
    assert find(index, chain_of(1, 2, 3, 4, 9, 6, 7, 8)) == [0, None]
    assert find(index, chain_of(9, 2, 3, 4, 5, 6, 7, 8)) == [None, None]
    assert len(index) == 2


def test_a_hole_does_not_hide_what_lies_behind() -> None:
    """A block is found by its own key, whether or not its parent is there."""
    chain = chain_of(*range(12))
    index = index_of(chain)

    assert index.discard([BlockId(1)]) == [chain.keys[1]]
    assert find(index, chain) == [0, None, 2]
    assert index.get(chain.keys[1]) is None


def test_colliding_keys_are_told_apart_by_their_tokens() -> None:
    """A block under the right key with other tokens is not a hit."""
    chain = chain_of(1, 2, 3, 4)
    index = BlockIndex()
    index.add([BlockId(0)], [Entry(chain.keys[0], ROOT, chain_of(9, 9, 9, 9).packed(0, 4), ROOT)])

    assert find(index, chain) == [None]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((1, 2, 9, 9), (0, 2)),
        ((1, 2, 3, 9), (0, 3)),
        ((1, 2), (0, 2)),
        ((1, 7, 7, 7, 7), (1, 4)),
        ((1,), (1, 1)),  # of equals the newest
        ((9, 2, 3, 4), None),
    ],
)
def test_a_partial_match_shares_the_most_leading_tokens(
    tokens: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    """Among the children of a key the one with the longest common beginning is chosen."""
    children = [chain_of(1, 2, 3, 4), chain_of(1, 7, 7, 7), chain_of(5, 2, 3, 4)]
    index = index_of(*children)

    match = index.find_partial(ROOT, chain_of(*tokens).packed(0, 4 if len(tokens) > 4 else 9))

    if expected is None:
        assert match is None
    else:
        assert match is not None
        assert (match.key, match.num_tokens) == (children[expected[0]].keys[0], expected[1])


def test_a_partial_match_is_a_child_of_the_key_asked_for() -> None:
    """Equal tokens behind another parent are other content."""
    index = index_of(chain_of(1, 2, 3, 4, 5, 6, 7, 8))
    other = chain_of(9, 9, 9, 9, 5, 6, 7, 8)

    assert index.find_partial(other.keys[0], other.packed(4, 8)) is None


def test_tokens_are_compared_whole() -> None:
    """Ids that share some of their bytes share no token."""
    index = index_of(chain_of(1, 0x0100, 3, 4))

    match = index.find_partial(ROOT, chain_of(1, 0x0200, 3, 4).packed(0, 4))

    assert match is not None
    assert match.num_tokens == 1


def test_a_discarded_child_is_not_matched() -> None:
    """What is forgotten is forgotten for partial matches too."""
    index = index_of(chain_of(1, 2, 3, 4), chain_of(1, 9, 9, 9))
    index.discard([BlockId(0)])

    match = index.find_partial(ROOT, chain_of(1, 2, 3, 4).packed(0, 4))

    assert match is not None
    assert match.num_tokens == 1
    index.discard([BlockId(1)])
    assert index.find_partial(ROOT, chain_of(1, 2, 3, 4).packed(0, 4)) is None
    assert index.check() == []


def _forget_a_key(index: BlockIndex) -> None:
    del index._key_to_block[chain_of(*range(8)).keys[1]]


def _move_a_key(index: BlockIndex) -> None:
    index._key_to_block[chain_of(*range(8)).keys[1]] = BlockId(0)


def _forget_a_block(index: BlockIndex) -> None:
    del index._block_to_entry[BlockId(1)]


def _forget_a_child(index: BlockIndex) -> None:
    index._children._parent_to_first.clear()


def _double_a_child(index: BlockIndex) -> None:
    key = index._children._parent_to_first[ROOT]
    index._children._parent_to_others[ROOT] = {key: None}


def _invent_a_child(index: BlockIndex) -> None:
    index._children.add(BlockKey(b"x" * 32), BlockKey(b"y" * 32))


DAMAGES = [
    _forget_a_key,
    _move_a_key,
    _forget_a_block,
    _forget_a_child,
    _double_a_child,
    _invent_a_child,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_noticed(damage: Callable[[BlockIndex], None]) -> None:
    """Whatever drifts by hand is reported by check."""
    index = index_of(chain_of(*range(8)))
    assert index.check() == []

    damage(index)

    assert index.check() != []


def ledger_with(chain: TokenChain) -> BlockLedger:
    """A ledger of four blocks that knows a chain and has no holders."""
    ledger = BlockLedger(full(), BlockPool(4, LRU()))
    allocation = ledger.allocate(len(chain.keys))
    assert allocation is not None
    ledger.seal(allocation.blocks, entries_of(chain))
    ledger.pool.release(allocation.blocks)
    return ledger


def test_what_is_evicted_is_no_longer_found() -> None:
    """Pool and index change together."""
    chain = chain_of(*range(12))
    ledger = ledger_with(chain)

    allocation = ledger.allocate(2)

    assert allocation is not None
    assert len(allocation.evicted) == 1
    assert [ledger.get(key) is None for key in chain.keys] == [False, False, True]
    assert [ledger.key_of(block) for block in allocation.blocks] == [None, None]
    assert ledger.check([int(block in allocation.blocks) for block in range(4)]) == []


def test_known_content_is_not_published_twice() -> None:
    """The second block with the same content stays its holder's private copy."""
    chain = chain_of(1, 2, 3, 4)
    ledger = ledger_with(chain)
    known = ledger.get(chain.keys[0])
    allocation = ledger.allocate(1)
    assert allocation is not None

    ledger.seal(allocation.blocks, entries_of(chain))

    assert ledger.get(chain.keys[0]) == known
    assert ledger.is_private(allocation.blocks[0])
    assert ledger.num_sealed == 1


def test_a_ledger_notices_when_pool_and_index_disagree() -> None:
    """A sealed block without a key, or a key without a sealed block, is reported by group."""
    ledger = ledger_with(chain_of(*range(8)))
    assert ledger.check([0] * 4) == []

    ledger._index.discard([BlockId(0)])

    assert ledger.check([0] * 4) == ["group full: block 0 is SEALED, index disagrees"]
