"""The conformance suite of tiers: what subclasses TierSuite and passes is a tier that kvkeep can use.

    class TestMyTier(TierSuite):
        def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
            return MyTier(capacity_bytes)

pytest, which kvkeep itself does not need, finds the tests in the subclass.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_checks import CAPACITY_BYTES
from kvkeep.testing.tier_contents import content_of, cut, key_of, read_object, store_object
from kvkeep.testing.tier_label_suite import TierLabelSuite
from kvkeep.tiers.base import (
    Got,
    Miss,
    MissCause,
    Presence,
    PutOutcome,
    StoredObject,
    Tier,
    TierStats,
)
from kvkeep.tiers.stack import SpillingTier

__all__ = ["TierSuite"]

_HAMMER_S = 1.5
_NUM_THREADS = 4
_MOST_PUTS = 1000


class TierSuite(TierLabelSuite):
    """Everything that `kvkeep.tiers.base.Tier` promises, as tests.

    `open_tier` gives a tier that is empty the first time it is asked for a folder, and holds the same objects
    the next time if it is persistent. A tier that somebody else bounds ignores `capacity_bytes`; tests of
    the bound are skipped for it. Set `keeps_bytes` to False for a tier whose objects have no bytes, and
    `evicts_oldest_first` to False where another order than that of use decides.
    """

    # ---------------------------------------------------------------------- what there is

    def test_iteration_shows_all_that_is_complete(self, tier: Tier) -> None:
        """Every object is listed once, with its length; so it is while others come and go."""
        stored = {StoredObject(key_of(number), 100 + number) for number in range(20)}
        for item in stored:
            store_object(tier, item.key, item.num_bytes)

        listed = list(tier.objects())
        for at, _ in enumerate(tier.objects()):
            store_object(tier, key_of(1000 + at), 50)
            tier.delete([key_of(at)])

        assert len(listed) == len(stored)
        assert set(listed) == stored

    def test_counters_add_up(self, tier: Tier) -> None:
        """Each outcome and each miss is counted once; what is held and what is free is the capacity."""
        for number in range(5):
            store_object(tier, key_of(number), 1000)
        store_object(tier, key_of(0), 1000)
        for number in range(3, 9):
            read_object(tier, key_of(number), 1000)
        read_object(tier, key_of(1), 999)
        tier.delete([key_of(2)])

        stats = tier.stats()

        assert stats.name == tier.name
        assert _counts(stats.puts) == {PutOutcome.STORED: 5, PutOutcome.PRESENT: 1}
        assert _counts(stats.misses) == {MissCause.ABSENT: 4, MissCause.SHORT: 1}
        assert stats.num_objects == 4 == len(list(tier.objects()))
        assert stats.in_use_bytes == 0
        assert stats.reusable_bytes == tier.used_bytes >= 4000
        _assert_adds_up(stats)

    # ------------------------------------------------------------------------- the bound

    def test_what_is_used_never_exceeds_the_capacity(self, tier: Tier) -> None:
        """Objects of all sizes come in; the bound holds after, and during, each of them."""
        capacity, chooser, seen = self.capacity_of(tier), random.Random(1), []  # noqa: S311  cases

        def watched(content: bytes) -> Iterator[memoryview]:
            for part in cut(content, [len(content) // 2]):
                seen.append(tier.used_bytes)
                yield part

        for number in range(200):
            num_bytes = chooser.choice([100, 5000, 70_000, 300_000, 1_000_000])
            key = key_of(number)
            tier.put(key, watched(content_of(key, num_bytes)), num_bytes)
            seen.append(tier.used_bytes)
            _assert_adds_up(tier.stats())
        stats = tier.stats()

        assert max(seen) <= capacity
        assert stats.num_evictions > 0
        assert stats.num_objects == stats.puts.get(PutOutcome.STORED, 0) - stats.num_evictions
        for item in tier.objects():
            self.assert_holds(tier, item.key, item.num_bytes)

    def test_what_is_larger_than_the_tier_is_refused(self, tier: Tier) -> None:
        """It is refused before anything is evicted for it, and before a part is asked for."""
        capacity = self.capacity_of(tier)
        store_object(tier, key_of(1), 1000)

        outcome = tier.put(key_of(2), iter(_ask, None), capacity + 1)

        assert outcome is PutOutcome.REFUSED
        self.assert_lacks(tier, key_of(2), 1000)
        self.assert_holds(tier, key_of(1), 1000)
        assert tier.stats().num_evictions == 0

    def test_the_oldest_goes_first(self, tier: Tier) -> None:
        """To get or to touch an object is to use it: others go before it, in the order of their use."""
        self.capacity_of(tier)
        if not self.evicts_oldest_first:
            pytest.skip("another order decides")
        num_stored = 0
        while tier.stats().num_evictions == 0:
            if num_stored == 6:
                read_object(tier, key_of(0), 100_000)
                tier.touch([key_of(2)])
            assert store_object(tier, key_of(num_stored), 100_000) is PutOutcome.STORED
            num_stored += 1
            assert num_stored < _MOST_PUTS
        assert num_stored > 8
        for number in range(num_stored, num_stored + 3):
            store_object(tier, key_of(number), 100_000)

        gone = [at for at in range(num_stored + 3) if tier.find([key_of(at)]) == [Presence.ABSENT]]

        assert gone == [1, 3, 4, 5]

    def test_evicted_bytes_are_shown_before_they_go(self, tier: Tier) -> None:
        """`on_evict` sees each victim whole, with its labels, when the tier does not have it any more."""
        self.capacity_of(tier)
        if not isinstance(tier, SpillingTier):
            pytest.skip("it does not show what it evicts")
        victims: dict[StoredKey, bytes] = {}

        def spill(key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
            assert tier.find([key]) == [Presence.ABSENT]
            assert labels == key[:5]
            assert key not in victims
            victims[key] = b"".join(parts)

        tier.on_evict = spill
        sizes = {key_of(number): 1000 + 3777 * (number % 50) for number in range(150)}
        for key, num_bytes in sizes.items():
            assert store_object(tier, key, num_bytes, key[:5]) is PutOutcome.STORED

        assert len(victims) == tier.stats().num_evictions > 10
        for key, content in victims.items():
            assert len(content) == sizes[key]
            assert not self.keeps_bytes or content == content_of(key, sizes[key])

    # --------------------------------------------------------------------------- threads

    def test_threads_do_not_mix_objects_up(self, tier: Tier) -> None:
        """Whatever threads do beside each other, a get has the bytes of its key or is a miss."""
        until = monotonic() + _HAMMER_S
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            works = [pool.submit(self._hammer, tier, seed, until) for seed in range(_NUM_THREADS)]
            num_got = [work.result() for work in works]

        assert min(num_got) > 0
        listed = list(tier.objects())
        assert len({item.key for item in listed}) == len(listed)
        for item in listed:
            self.assert_holds(tier, item.key, item.num_bytes)
        _assert_adds_up(tier.stats())
        assert tier.stats().in_use_bytes == 0

    def _hammer(self, tier: Tier, seed: int, until: float) -> int:
        """Random calls until a time; returns how many gets found something."""
        chooser, num_got = random.Random(seed), 0  # noqa: S311  cases
        does: list[Callable[[StoredKey, int], object]] = [
            lambda key, num_bytes: store_object(tier, key, num_bytes),
            lambda key, num_bytes: store_object(tier, key, num_bytes),
            lambda key, _: tier.delete([key]) if chooser.random() < 0.3 else None,
            lambda key, _: tier.touch([key]),
            lambda key, _: tier.relabel(key, chooser.randbytes(5)),
        ]
        while monotonic() < until or not num_got:
            number = chooser.randrange(80)
            key, num_bytes = key_of(number), 1 + 3001 * number
            chooser.choice(does)(key, num_bytes)
            for at in (number, chooser.randrange(80)):
                found = read_object(tier, key_of(at), 1 + 3001 * at)
                if not isinstance(found, Miss):
                    num_got += 1
                    assert not self.keeps_bytes or found == content_of(key_of(at), 1 + 3001 * at)
            capacity = tier.capacity_bytes
            assert capacity is None or tier.used_bytes <= capacity
        return num_got

    # ----------------------------------------------------------------------------- close

    def test_a_closed_tier_only_misses(self, tier: Tier) -> None:
        """Closing twice is closing; whoever still calls is told that nothing is there."""
        key, buffer = key_of(1), bytearray(1000)
        store_object(tier, key, 1000)

        tier.close()
        tier.close()

        assert tier.find([key]) == [Presence.ABSENT]
        found = tier.get(key, [memoryview(buffer)])
        assert isinstance(found, Miss)
        assert found.cause is MissCause.UNAVAILABLE
        assert store_object(tier, key_of(2), 1000) in (PutOutcome.FAILED, PutOutcome.REFUSED)
        assert tier.delete([key]) == 0
        assert list(tier.objects()) == []
        assert tier.labels(key) is None
        assert not tier.relabel(key, b"tag")
        assert list(tier.labelled()) == []
        assert tier.hold([key]) == [False]
        tier.let_go([key])
        tier.touch([key])
        _assert_adds_up(tier.stats())

    def test_a_persistent_tier_holds_the_same_when_it_is_opened_again(
        self, tier: Tier, tmp_path: Path
    ) -> None:
        """Objects, and labels where it keeps them, outlive the process that put them."""
        if not tier.capabilities.is_persistent:
            pytest.skip("it is not persistent")
        relabels = tier.capabilities.relabels
        for number in range(10):
            before = b"old" if relabels else b"tag %d" % number
            store_object(tier, key_of(number), 1000 + number, before)
            tier.relabel(key_of(number), b"tag %d" % number)
        tier.delete([key_of(3)])
        listed = set(tier.objects())
        tier.close()

        with self.open_tier(tmp_path, CAPACITY_BYTES) as again:
            assert set(again.objects()) == listed
            for number in set(range(10)) - {3}:
                key = key_of(number)
                buffer = bytearray(1000 + number)
                labels = b"tag %d" % number if again.capabilities.keeps_labels else None
                assert again.get(key, [memoryview(buffer)]) == Got(1000 + number, labels or b"")
                assert not self.keeps_bytes or bytes(buffer) == content_of(key, 1000 + number)
                assert again.labels(key) == labels
            self.assert_lacks(again, key_of(3), 1003)


def _counts(counts: dict[str, int]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if number}


def _assert_adds_up(stats: TierStats) -> None:
    """All that is held, and what is free, is the capacity."""
    held = stats.in_use_bytes + stats.reusable_bytes
    assert min(stats.in_use_bytes, stats.reusable_bytes, stats.num_objects) >= 0
    assert (stats.free_bytes is None) == (stats.capacity_bytes is None)
    if stats.capacity_bytes is not None and stats.free_bytes is not None:
        assert held + stats.free_bytes == stats.capacity_bytes
        assert stats.free_bytes >= 0


def _ask() -> memoryview | None:
    raise AssertionError("a part was asked for")
