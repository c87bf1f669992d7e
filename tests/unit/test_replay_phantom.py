"""A tier without bytes keeps the books of one with bytes."""

from collections.abc import Sequence

import pytest

from kvkeep.errors import ConfigError
from kvkeep.policies import LRU
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Miss, MissCause, Occasion, Presence, PutOutcome, StoredObject
from kvkeep.tiers.phantom import PhantomTier, phantom_bytes
from kvkeep.tiers.stack import Floor, TierStack

A, B, C = (StoredKey(name) for name in (b"a", b"b", b"c"))
TERABYTE = 10**12


def put(tier: PhantomTier, key: StoredKey, num_bytes: int) -> PutOutcome:
    """Put an object of so many bytes."""
    return tier.put(key, [phantom_bytes(num_bytes)], num_bytes)


def test_large_objects_take_no_memory() -> None:
    """A terabyte is put, got, counted and iterated like a byte."""
    with PhantomTier(3 * TERABYTE) as tier:
        assert put(tier, A, TERABYTE) is PutOutcome.STORED

        assert tier.get(A, [phantom_bytes(TERABYTE - 9), phantom_bytes(9)]) == Got(TERABYTE)
        assert tier.used_bytes == tier.put_bytes == tier.got_bytes == TERABYTE
        assert list(tier.objects()) == [StoredObject(A, TERABYTE)]


def test_every_outcome_is_told_and_counted() -> None:
    """Lengths are compared, what is there stays, what is too large is refused."""
    tier = PhantomTier(10, name="small")
    outcomes = [put(tier, A, 6), put(tier, A, 7), put(tier, B, 11)]
    found = [tier.get(A, [phantom_bytes(7)]), tier.get(B, [phantom_bytes(11)])]
    stats = tier.stats()

    assert outcomes == [PutOutcome.STORED, PutOutcome.PRESENT, PutOutcome.REFUSED]
    assert [one.cause for one in found if isinstance(one, Miss)] == [
        MissCause.SHORT,
        MissCause.ABSENT,
    ]
    assert tier.find([A, B]) == [Presence.PRESENT, Presence.ABSENT]
    assert stats.puts == {"stored": 1, "present": 1, "refused": 1}
    assert stats.misses == {"short": 1, "absent": 1}
    assert (stats.name, stats.reusable_bytes, stats.free_bytes, stats.num_objects) == (
        "small", 6, 4, 1,
    )  # fmt: skip
    assert tier.got_bytes == 0


def test_what_goes_is_shown_with_its_length() -> None:
    """The least recently used goes first, and is no longer there when its place is taken."""
    tier = PhantomTier(10, policy=LRU())
    shown: list[tuple[StoredKey, int, bytes]] = []

    def show(key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
        shown.append((key, sum(part.nbytes for part in parts), labels))

    tier.on_evict = show
    put(tier, A, 4)
    put(tier, B, 5)
    tier.relabel(B, b"tag")
    tier.get(A, [phantom_bytes(4)])
    put(tier, C, 6)

    assert shown == [(B, 5, b"tag")]
    assert tier.find([A, B, C]) == [Presence.PRESENT, Presence.ABSENT, Presence.PRESENT]
    assert tier.stats().num_evictions == 1


def test_it_falls_down_a_stack_of_phantoms() -> None:
    """What the upper tier evicts is in the lower one, at its right size."""
    upper, lower = PhantomTier(10, name="upper"), PhantomTier(100, name="lower")
    stack = TierStack(
        [Floor(upper, frozenset(Occasion)), Floor(lower, frozenset({Occasion.EVICTED}))]
    )

    for key in (A, B):
        stack.put(key, lambda: [phantom_bytes(7)], 7, Occasion.EVICTED)

    assert list(lower.objects()) == [StoredObject(A, 7)]
    assert list(upper.objects()) == [StoredObject(B, 7)]


def test_labels_and_deletes_are_those_of_the_books() -> None:
    """Labels stay with their object and go with it."""
    tier = PhantomTier(10)
    put(tier, A, 1)

    assert tier.relabel(A, b"tag")
    assert tier.labels(A) == b"tag"
    assert tier.delete([A, B]) == 1
    assert tier.labels(A) is None
    assert not tier.relabel(A, b"tag")


def test_a_use_elsewhere_keeps_a_copy() -> None:
    """A touch is a use: the other one goes."""
    tier = PhantomTier(2)
    put(tier, A, 1)
    put(tier, B, 1)
    tier.touch([A, C])
    put(tier, C, 1)

    assert tier.find([A, B, C]) == [Presence.PRESENT, Presence.ABSENT, Presence.PRESENT]


@pytest.mark.parametrize("capacity_bytes", [0, -5])
def test_a_tier_without_room_is_a_setting_error(capacity_bytes: int) -> None:
    """The message names field and value."""
    with pytest.raises(ConfigError, match=f"capacity_bytes={capacity_bytes} is not positive"):
        PhantomTier(capacity_bytes)
    with pytest.raises(ConfigError, match="policy='mru' is not known"):
        PhantomTier(1, policy="mru")
