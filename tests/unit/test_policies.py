"""One contract for every eviction policy, and what sets each apart."""

from collections.abc import Callable

import pytest

from kvkeep.errors import ConfigError
from kvkeep.policies import LRU, SLRU, EvictionPolicy, make_policy

EVERY_POLICY = pytest.mark.parametrize("make", [LRU, SLRU])
Make = Callable[[], EvictionPolicy[int]]


def contents(policy: EvictionPolicy[int], items: range = range(100)) -> set[int]:
    """The evictable ones among `items`."""
    return {item for item in items if item in policy}


def reuse(policy: EvictionPolicy[int], items: list[int]) -> None:
    """Use evictable items once more."""
    policy.remove(items)
    policy.insert(items)


@EVERY_POLICY
def test_an_empty_policy_has_nothing(make: Make) -> None:
    """Nothing is evictable, and nothing can be evicted, before an insert."""
    policy = make()

    assert len(policy) == 0
    assert 1 not in policy
    assert policy.evict(0) == []
    assert policy.evict(1) is None


@EVERY_POLICY
def test_the_oldest_insert_goes_first(make: Make) -> None:
    """What was inserted first is evicted first."""
    policy = make()
    for item in (3, 1, 2):
        policy.insert([item])

    assert policy.evict(2) == [3, 1]
    assert contents(policy) == {2}


@EVERY_POLICY
def test_a_leaf_goes_before_its_parents(make: Make) -> None:
    """Within one insert the end of the chain is evicted first, its root last."""
    policy = make()
    policy.insert([1, 2, 3])
    policy.insert([7, 8])

    assert policy.evict(5) == [3, 2, 1, 8, 7]
    assert len(policy) == 0


@EVERY_POLICY
def test_evicting_is_all_or_nothing(make: Make) -> None:
    """Asked for more than there is, a policy evicts nothing and forgets no order."""
    policy = make()
    policy.insert([1, 2])
    policy.insert([3])

    assert policy.evict(4) is None
    assert contents(policy) == {1, 2, 3}
    assert policy.evict(3) == [2, 1, 3]


@EVERY_POLICY
def test_what_is_used_again_goes_behind(make: Make) -> None:
    """An item removed for use and inserted again is the most recent one."""
    policy = make()
    policy.insert([3, 2, 1])
    policy.remove([1])
    assert contents(policy) == {2, 3}
    assert len(policy) == 2

    policy.insert([1])

    assert policy.evict(3) == [2, 3, 1]


@EVERY_POLICY
def test_forgetting_takes_out_what_is_there_and_ignores_the_rest(make: Make) -> None:
    """Items whose content is gone leave the policy, whether they were evictable or in use."""
    policy = make()
    policy.insert([1, 2])
    policy.remove([1])

    policy.forget([1, 2, 3])

    assert len(policy) == 0
    assert policy.evict(1) is None


@EVERY_POLICY
def test_a_place_with_new_content_starts_anew(make: Make) -> None:
    """After its eviction, or a forget, nothing of an item's past counts for its next content."""
    policy = make()
    policy.insert([1])
    policy.remove([1])
    policy.insert([1])
    assert policy.evict(1) == [1]
    policy.insert([2])
    policy.remove([2])
    policy.forget([2])

    policy.insert([1])
    policy.insert([2])
    policy.insert([3])

    assert policy.evict(3) == [1, 2, 3]


@EVERY_POLICY
def test_an_evicted_favourite_comes_back_as_a_stranger(make: Make) -> None:
    """Uses before an eviction do not count for what the place holds afterwards."""
    policy = make()
    policy.insert(list(range(10)))
    reuse(policy, list(range(10)))
    evicted = policy.evict(10)
    assert evicted is not None
    policy.insert(list(range(20, 30)))

    policy.insert([evicted[-1]])
    policy.insert([40])

    assert policy.evict(12) == [*range(29, 19, -1), evicted[-1], 40]


@EVERY_POLICY
def test_evicted_and_remaining_items_are_all_items(make: Make) -> None:
    """Whatever the order of use, no item is lost, doubled, or evicted while in use."""
    policy = make()
    policy.insert(list(range(20)))
    policy.remove([3, 5, 7])
    policy.insert([5])

    evicted = policy.evict(11)

    assert evicted is not None
    assert len(set(evicted)) == 11
    assert len(policy) == 7
    assert contents(policy) | set(evicted) == set(range(20)) - {3, 7}
    assert not contents(policy) & set(evicted)


def test_slru_keeps_what_was_used_twice_through_a_scan() -> None:
    """Many items that are used once do not push out the few that are used again."""
    policy = SLRU[int](protected_share=0.8)
    policy.insert(list(range(10)))
    reuse(policy, [0, 1, 2])

    for item in range(20, 60):
        policy.insert([item])
        policy.evict(1)

    assert {0, 1, 2} <= contents(policy)
    assert len(policy) == 10


def test_lru_does_not_resist_a_scan() -> None:
    """The same scan empties an LRU, which is why there is a choice."""
    policy = LRU[int]()
    policy.insert(list(range(10)))
    reuse(policy, [0, 1, 2])

    for item in range(20, 60):
        policy.insert([item])
        policy.evict(1)

    assert contents(policy) == set(range(50, 60))


@pytest.mark.parametrize(("share", "survivors"), [(0.5, 5), (0.8, 8), (0.0, 0)])
def test_slru_protects_at_most_its_share(share: float, survivors: int) -> None:
    """However many items were used again, the oldest beyond the share go like all others."""
    policy = SLRU[int](protected_share=share)
    policy.insert(list(range(10)))
    for item in range(10):
        reuse(policy, [item])

    # Ten new items, one for each that goes: what is left of the first ten was protected.
    for item in range(20, 40):
        policy.evict(1)
        policy.insert([item])

    assert contents(policy, range(10)) == set(range(10 - survivors, 10))


def test_slru_demotes_in_order_of_use() -> None:
    """What falls out of the protected segment is the newest of the rest, its oldest first."""
    policy = SLRU[int](protected_share=0.5)
    policy.insert([0])
    policy.insert([1])
    policy.insert([2])
    policy.insert([3])
    reuse(policy, [0, 1, 2, 3])

    assert policy.evict(4) == [3, 2, 1, 0]


@pytest.mark.parametrize(("name", "kind"), [("lru", LRU), ("slru", SLRU)])
def test_policies_are_made_by_name(name: str, kind: type) -> None:
    """Every call makes a fresh policy of the named kind."""
    first: EvictionPolicy[int] = make_policy(name)
    second: EvictionPolicy[int] = make_policy(name)
    first.insert([1])

    assert type(first) is kind
    assert len(second) == 0


def test_an_unknown_policy_is_a_setting_error() -> None:
    """The message names the value and the choices."""
    with pytest.raises(ConfigError, match="policy='lfu' is not known"):
        make_policy("lfu")
