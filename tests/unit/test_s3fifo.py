"""S3-FIFO: what is used once passes through a small queue."""

import pytest

from kvkeep.policies import S3FIFO, EvictionPolicy, make_policy


def reuse(policy: EvictionPolicy[int], items: list[int], times: int = 1) -> None:
    """Use evictable items so many times more."""
    for _ in range(times):
        policy.remove(items)
        policy.insert(items)


def scan(policy: EvictionPolicy[int], items: range) -> list[int]:
    """Insert items one by one, each in place of one that goes; those that went."""
    victims = []
    for item in items:
        evicted = policy.evict(1)
        assert evicted is not None
        victims += evicted
        policy.insert([item])
    return victims


def test_what_is_used_once_passes_by() -> None:
    """A scan evicts itself and leaves the main queue alone."""
    policy = S3FIFO[int]()
    policy.insert(list(range(10)))
    reuse(policy, [0, 1, 2], times=2)

    victims = scan(policy, range(20, 60))

    assert {0, 1, 2} <= {item for item in range(60) if item in policy}
    assert victims[:7] == [9, 8, 7, 6, 5, 4, 3]


@pytest.mark.parametrize(("uses", "stays"), [(1, False), (2, True)])
def test_two_more_uses_open_the_main_queue(uses: int, *, stays: bool) -> None:
    """One more use in the small queue is not enough, as in the paper."""
    policy = S3FIFO[int]()
    policy.insert([0])
    reuse(policy, [0], times=uses)
    policy.insert([1])
    policy.insert([2])

    policy.evict(2)

    assert (0 in policy) == stays


def test_the_main_queue_gives_a_round_for_every_use() -> None:
    """Of two items the one used more often stays, though the other was used last."""
    policy = S3FIFO[int]()
    policy.insert([0, 1])
    reuse(policy, [0, 1], times=2)
    assert policy.evict(0) == []
    policy.insert([9])
    # 1 and 0 move to the main queue, where uses of before do not count, and 9 goes.
    assert policy.evict(1) == [9]

    reuse(policy, [1], times=2)
    reuse(policy, [0])

    assert policy.evict(2) == [0, 1]


def test_more_than_three_uses_count_as_three() -> None:
    """An item used five times has no more rounds than one used three times, and was used before it."""
    policy = S3FIFO[int]()
    policy.insert([0, 1])
    reuse(policy, [0, 1], times=2)
    policy.insert([9])
    assert policy.evict(1) == [9]

    reuse(policy, [1], times=5)
    reuse(policy, [0], times=3)

    assert policy.evict(2) == [1, 0]


def test_a_small_queue_below_its_share_is_spared() -> None:
    """With nearly all items in the main queue it is the main queue that gives one up."""
    policy = S3FIFO[int]()
    policy.insert(list(range(20)))
    reuse(policy, list(range(20)), times=2)
    policy.insert([98])

    assert policy.evict(1) == [19]
    policy.insert([99])
    policy.insert([100])
    assert policy.evict(1) == [98]


def test_no_more_is_remembered_than_there_are_items() -> None:
    """A long scan leaves a memory as large as the place, the latest of it."""
    policy = S3FIFO[int](remembers_evicted=True)
    policy.insert(list(range(10)))
    scan(policy, range(100, 1100))

    assert len(policy._ghosts) == 10
    assert 1089 in policy._ghosts


def test_forgotten_content_leaves_no_memory() -> None:
    """What was deleted comes back as a stranger."""
    policy = S3FIFO[int](remembers_evicted=True)
    policy.insert([0])
    policy.insert([1])
    assert policy.evict(1) == [0]

    policy.forget([0])
    policy.insert([0])
    policy.insert([2])

    assert policy.evict(3) == [1, 0, 2]


@pytest.mark.parametrize("by_content", [False, True])
def test_only_names_of_contents_are_remembered(*, by_content: bool) -> None:
    """By name the policy is made for places, or for contents, which may come back."""
    policy: EvictionPolicy[int] = make_policy("s3fifo", by_content=by_content)
    policy.insert([0])
    policy.insert([1])
    assert policy.evict(1) == [0]
    policy.insert([0])
    policy.insert([2])

    # Remembered, it is in the main queue, and the small one goes first.
    assert policy.evict(3) == ([1, 2, 0] if by_content else [1, 0, 2])
