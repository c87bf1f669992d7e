"""Greedy dual size frequency: value per byte, with aging."""

from kvkeep.policies import GDSF, EvictionPolicy, make_policy


def reuse(policy: EvictionPolicy[int], item: int, times: int) -> None:
    """Use an evictable item so many times more."""
    for _ in range(times):
        policy.remove([item])
        policy.insert([item])


def test_what_is_used_often_outlives_a_scan() -> None:
    """Items that are used once pass by one that was used three times."""
    policy = GDSF[int]()
    policy.insert([1])
    reuse(policy, 1, 2)
    policy.insert([2])

    assert policy.evict(1) == [2]
    policy.insert([3])
    assert policy.evict(1) == [3]
    assert 1 in policy


def test_old_uses_count_less_and_less() -> None:
    """Every eviction ages the place by the value of its victim, until the favourite of old goes."""
    policy = GDSF[int]()
    policy.insert([0])
    reuse(policy, 0, 4)

    victims = []
    for item in range(1, 10):
        policy.insert([item])
        evicted = policy.evict(1)
        assert evicted is not None
        victims += evicted

    # Five uses are worth five strangers; of equal value the one that was used earlier goes.
    assert victims == [1, 2, 3, 4, 0, 5, 6, 7, 8]


def test_the_dear_and_the_small_stay() -> None:
    """Value is cost over size: cheap goes before dear, large before small."""
    item_to_cost = {1: 1.0, 2: 10.0, 3: 10.0, 4: 1.0}
    item_to_size = {1: 1.0, 2: 1.0, 3: 5.0, 4: 4.0}
    policy = GDSF[int](cost_of=item_to_cost.__getitem__, size_of=item_to_size.__getitem__)
    for item in (2, 3, 1, 4):
        policy.insert([item])

    assert policy.evict(4) == [4, 1, 3, 2]


def test_of_equal_value_the_leaf_goes_first() -> None:
    """A chain used as a whole loses its end first, and what was used before it goes before it."""
    policy = GDSF[int]()
    policy.insert([7, 8, 9])
    policy.insert([1, 2, 3])

    assert policy.evict(6) == [9, 8, 7, 3, 2, 1]


def test_uses_of_a_shared_root_keep_it_above_its_leaves() -> None:
    """A root that three chains share outlives all their leaves."""
    policy = GDSF[int]()
    policy.insert([0, 1])
    for leaf in (2, 3):
        policy.remove([0])
        policy.insert([0, leaf])

    assert policy.evict(4) == [1, 2, 3, 0]


def test_many_uses_do_not_fill_memory() -> None:
    """What the order keeps of earlier uses is bounded by the number of items."""
    policy = GDSF[int]()
    policy.insert(list(range(10)))

    for _ in range(1000):
        reuse(policy, 3, 1)

    assert len(policy._heap) < 100
    assert policy.evict(10) == [9, 8, 7, 6, 5, 4, 2, 1, 0, 3]


def test_it_is_made_by_name() -> None:
    """Both kinds of items have it."""
    on_device: EvictionPolicy[int] = make_policy("gdsf")
    below: EvictionPolicy[int] = make_policy("gdsf", by_content=True)

    assert type(on_device) is type(below) is GDSF
