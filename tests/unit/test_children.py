"""The children of keys against a dict of lists."""

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.blocks.children import KeyChildren
from kvkeep.spec import BlockKey

PAIRS = st.tuples(st.integers(0, 3), st.integers(0, 5))


def _key(number: int) -> BlockKey:
    return BlockKey(bytes([number]) * 32)


@given(st.lists(PAIRS, max_size=40), st.integers(1, 4))
def test_children_are_those_added_and_not_removed(pairs: list[tuple[int, int]], most: int) -> None:
    """Adding and removing, in any order, leaves what a plain dict of lists has, newest first."""
    children = KeyChildren()
    model: dict[int, list[int]] = {}

    for parent, child in pairs:
        siblings = model.setdefault(parent, [])
        if child in siblings:
            siblings.remove(child)
            children.remove(_key(parent), _key(child))
        else:
            siblings.append(child)
            children.add(_key(parent), _key(child))

    assert len(children) == sum(map(len, model.values()))
    for parent, siblings in model.items():
        assert children.newest(_key(parent), 100) == [_key(child) for child in siblings[::-1]]
        assert children.newest(_key(parent), most) == [_key(c) for c in siblings[::-1][:most]]
        assert all(children.has(_key(parent), _key(c)) == (c in siblings) for c in range(6))
