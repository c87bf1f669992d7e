"""The clairvoyant cache against every cache that there could be."""

from itertools import combinations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeep.replay import Clairvoyant, Optimum, ideal_hits
from kvkeep.spec import BlockKey

Chain = tuple[BlockKey, ...]


def chain(names: str) -> Chain:
    """A chain of blocks, a letter each."""
    return tuple(BlockKey(name.encode()) for name in names)


@st.composite
def traces(draw: st.DrawFn) -> list[Chain]:
    """Requests for paths from a root of a small forest, as prefixes are."""
    parents = draw(st.lists(st.integers(-1, 4), min_size=1, max_size=6))
    paths: list[Chain] = []
    for at, parent in enumerate(parents):
        before = paths[parent] if 0 <= parent < at else ()
        paths.append((*before, BlockKey(bytes([at]))))
    numbers = draw(st.lists(st.integers(0, len(paths) - 1), min_size=1, max_size=7))
    return [paths[number] for number in numbers]


def best_of_all(trace: list[Chain], num_blocks: int, *, contiguous: bool) -> int:
    """The most hits over every choice of what to keep after every request."""
    states: dict[frozenset[BlockKey], int] = {frozenset(): 0}
    for keys in trace:
        following: dict[frozenset[BlockKey], int] = {}
        for cached, hits in states.items():
            found = [key in cached for key in keys]
            new_hits = (found.index(False) if False in found else len(found)) if contiguous else 0
            total = hits + (new_hits if contiguous else sum(found))
            usable = sorted(cached.union(keys))
            for size in range(min(num_blocks, len(usable)) + 1):
                for kept in map(frozenset, combinations(usable, size)):
                    following[kept] = max(following.get(kept, 0), total)
        states = following
    return max(states.values())


@settings(max_examples=150)
@given(trace=traces(), num_blocks=st.integers(0, 3))
@example(trace=[chain("abc"), chain("d"), chain("d"), chain("abc")], num_blocks=2)
def test_no_cache_finds_more(trace: list[Chain], num_blocks: int) -> None:
    """Its hits are the most there can be with holes, and as contiguous prefixes, at the same time."""
    best = Optimum(
        hits=best_of_all(trace, num_blocks, contiguous=False),
        prefix_hits=best_of_all(trace, num_blocks, contiguous=True),
    )

    assert Clairvoyant(trace).hits(num_blocks) == best


@given(trace=traces())
def test_without_bound_everything_is_found_again(trace: list[Chain]) -> None:
    """A cache that holds all blocks finds what an unbounded one finds."""
    ideal = ideal_hits(trace)

    assert Clairvoyant(trace).hits(100) == Optimum(ideal, ideal)


@pytest.mark.parametrize(("num_blocks", "hits"), [(0, 0), (1, 2), (2, 4), (3, 5)])
def test_the_farthest_goes_first(num_blocks: int, hits: int) -> None:
    """A hand-made trace: what is used soon is kept, what is used late is let go."""
    trace = [chain(names) for names in ("a", "b", "c", "a", "b", "b", "a", "c")]

    assert Clairvoyant(trace).hits(num_blocks) == Optimum(hits, hits)


def test_prefixes_are_counted_for_themselves() -> None:
    """On blocks that are not named by prefix, a block behind a missing one is a hit and no prefix."""
    trace = [chain("ab"), chain("b"), chain("ab")]

    assert Clairvoyant(trace).hits(1) == Optimum(hits=2, prefix_hits=1)
