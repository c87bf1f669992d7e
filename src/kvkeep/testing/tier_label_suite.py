"""The part of the tier suite about labels, and about objects that are held."""

from concurrent.futures import ThreadPoolExecutor
from itertools import count
from random import Random
from time import monotonic

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, key_of, store_object
from kvkeep.testing.tier_object_suite import TierObjectSuite
from kvkeep.tiers.base import Got, Labelled, Miss, Presence, PutOutcome, Tier

__all__ = ["TierLabelSuite"]

_LABELS = (b"tag", b"another", bytes(10_000), b"\0\xff", bytes(480), bytes(500), b"")
_HAMMER_S = 1.0
_MOST_PUTS = 1000


class TierLabelSuite(TierObjectSuite):
    """Use TierSuite, which has these tests and more."""

    def got_labels(self, tier: Tier, key: StoredKey, num_bytes: int) -> bytes:
        """The labels that come with an object, which must be the right one."""
        buffer = bytearray(num_bytes)
        got = tier.get(key, [memoryview(buffer)])
        assert isinstance(got, Got), got
        assert got.num_bytes == num_bytes
        assert not self.keeps_bytes or bytes(buffer) == content_of(key, num_bytes)
        return got.labels

    def needs_labels(self, tier: Tier, *, and_relabels: bool = False) -> None:
        """Skip the test for a tier that keeps no labels, or cannot replace them."""
        able = tier.capabilities
        if not able.keeps_labels or (and_relabels and not able.relabels):
            pytest.skip("it keeps no labels" if not and_relabels else "it replaces no labels")

    def test_without_labels_all_of_them_are_ignored(self, tier: Tier) -> None:
        """A tier that keeps none takes objects all the same, and says so."""
        if tier.capabilities.keeps_labels:
            pytest.skip("it keeps labels")
        key = key_of(1)

        assert store_object(tier, key, 5000, b"tag") is PutOutcome.STORED

        assert tier.labels(key) is None
        assert not tier.relabel(key, b"tag")
        assert self.got_labels(tier, key, 5000) == b""
        assert list(tier.labelled()) == [Labelled(key, 5000, b"")]

    def test_labels_come_with_their_object(self, tier: Tier) -> None:
        """Those of the put are with every get, whatever their length; the object's bytes are its own."""
        self.needs_labels(tier)
        for number, labels in enumerate(_LABELS):
            assert store_object(tier, key_of(number), 5000, labels) is PutOutcome.STORED

        for number, labels in enumerate(_LABELS):
            assert self.got_labels(tier, key_of(number), 5000) == labels
            assert tier.labels(key_of(number)) == labels
            assert isinstance(tier.get(key_of(number), [memoryview(bytearray(5024))]), Miss)

    def test_what_is_present_keeps_its_labels(self, tier: Tier) -> None:
        """A put of what is there changes no labels either."""
        self.needs_labels(tier)
        key = key_of(1)
        store_object(tier, key, 5000, b"first")

        assert store_object(tier, key, 5000, b"second") is PutOutcome.PRESENT

        assert self.got_labels(tier, key, 5000) == b"first"

    def test_what_comes_into_a_place_has_its_own_labels(self, tier: Tier) -> None:
        """Of an evicted object nothing is left, labels included; nor of a deleted one."""
        self.capacity_of(tier)
        self.needs_labels(tier)
        for number in range(100):
            store_object(tier, key_of(number), 100_000, b"old" if number < 50 else b"")
            if number == 20:
                tier.delete([key_of(20)])

        assert tier.stats().num_evictions > 50
        listed = list(tier.labelled())
        assert {item.labels for item in listed} == {b""}
        for item in listed:
            assert self.got_labels(tier, item.key, 100_000) == b""

    def test_labels_can_be_replaced(self, tier: Tier) -> None:
        """They are empty at first and may grow and shrink; they go with their object."""
        self.needs_labels(tier)
        key = key_of(1)
        store_object(tier, key, 5000)
        assert tier.labels(key) == b""
        assert self.got_labels(tier, key, 5000) == b""
        if not tier.capabilities.relabels:
            assert not tier.relabel(key, b"tag")
            assert self.got_labels(tier, key, 5000) == b""
            return

        for labels in _LABELS:
            assert tier.relabel(key, labels)
            assert tier.labels(key) == labels
            assert self.got_labels(tier, key, 5000) == labels
        tier.relabel(key, b"old")
        tier.delete([key])
        assert tier.labels(key) is None
        store_object(tier, key, 5000)
        assert tier.labels(key) == b""

    def test_labels_make_no_object(self, tier: Tier) -> None:
        """Labels for what is gone come to nothing: neither an object nor a place for one stays."""
        key = key_of(1)
        store_object(tier, key, 5000, b"old")
        tier.delete([key])

        assert not tier.relabel(key, b"ghost")

        self.assert_lacks(tier, key, 5000)
        assert list(tier.labelled()) == []
        assert store_object(tier, key, 5000, b"new") is PutOutcome.STORED
        if tier.capabilities.keeps_labels:
            assert self.got_labels(tier, key, 5000) == b"new"

    def test_many_labels_are_replaced_at_once(self, tier: Tier) -> None:
        """By those that they have; what is not there is told, in the order of the question."""
        self.needs_labels(tier, and_relabels=True)
        keys = [key_of(number) for number in range(30)]
        for key in keys[::2]:
            store_object(tier, key, 700, b"old")

        def change(key: StoredKey, old: bytes) -> bytes | None:
            return None if key == keys[2] else old + b" new" + key[:3]

        assert tier.revise_labels(keys, change) == [True, False] * 15
        for key in keys[::2]:
            expected = b"old" if key == keys[2] else b"old new" + key[:3]
            assert self.got_labels(tier, key, 700) == expected
        assert tier.find(keys[1::2]) == [Presence.ABSENT] * 15
        assert tier.revise_labels([], change) == []

    def test_what_others_write_meanwhile_is_not_lost(self, tier: Tier) -> None:
        """Where several machines write labels, both find their own there."""
        self.needs_labels(tier, and_relabels=True)
        if not tier.capabilities.is_shared:
            pytest.skip("nobody else writes")
        key, seen = key_of(1), list[bytes]()
        store_object(tier, key, 700, b"old")

        def change(_key: StoredKey, old: bytes) -> bytes:
            seen.append(old)
            if len(seen) == 1:
                assert tier.relabel(key, b"and")
            return old + b" ours"

        assert tier.revise_labels([key], change) == [True]
        assert self.got_labels(tier, key, 700) == b"and ours"
        assert seen == [b"old", b"and"]

    def test_all_objects_are_listed_with_their_labels(self, tier: Tier) -> None:
        """Each once, with its length and its labels; what is deleted or being written is not among them."""
        self.needs_labels(tier)
        stored = {
            Labelled(key_of(number), 100 + number, bytes([number]) * (number % 7) ** 4)
            for number in range(40)
        }
        for item in stored:
            store_object(tier, item.key, item.num_bytes, item.labels)
        gone = {item for item in stored if item.num_bytes % 3 == 0}
        tier.delete([item.key for item in gone])

        listed = list(tier.labelled())

        assert len(listed) == len(set(listed))
        assert set(listed) == stored - gone

    def test_labels_are_not_there_before_their_object(self, tier: Tier) -> None:
        """While an object is being written it has no labels, and it has all of them afterwards."""
        self.needs_labels(tier)
        key = key_of(1)

        with self.writing(tier, key, 10_000, b"tag") as put:
            assert tier.labels(key) is None
            assert not tier.relabel(key, b"other")
            assert list(tier.labelled()) == []

        assert put.result() is PutOutcome.STORED
        assert self.got_labels(tier, key, 10_000) == b"tag"

    def test_a_get_beside_new_labels_has_some_of_them(self, tier: Tier) -> None:
        """Old or new ones, never a mixture, and never a miss."""
        self.needs_labels(tier, and_relabels=True)
        key, until = key_of(1), monotonic() + _HAMMER_S
        choices = [bytes([number]) * number for number in range(1, 120)]
        store_object(tier, key, 8192, choices[0])

        def write(seed: int) -> None:
            chooser = Random(seed)  # noqa: S311  cases
            while monotonic() < until:
                assert tier.relabel(key, chooser.choice(choices))

        def read() -> set[bytes]:
            seen = set[bytes]()
            while monotonic() < until:
                seen.add(self.got_labels(tier, key, 8192))
                assert tier.labels(key) in choices
            return seen

        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, seed) for seed in range(2)]
            readers = [pool.submit(read) for _ in range(2)]
            for writer in writers:
                writer.result()
            seen = set[bytes]().union(*(reader.result() for reader in readers))

        assert len(seen) > 3
        assert seen <= set(choices)

    # ------------------------------------------------------------------------------ holding

    def holding(self, tier: Tier) -> list[StoredKey]:
        """Four objects that a bounded tier holds; skips the test where it holds none."""
        self.capacity_of(tier)
        keys = [key_of(number) for number in range(4)]
        for key in keys:
            store_object(tier, key, 100_000, b"pin")
        if tier.hold(keys) == [False] * 4:
            pytest.skip("it holds nothing")
        return keys

    def needs_order(self) -> None:
        """Skip the test where what is used once more may outlive what comes."""
        if not self.evicts_oldest_first:
            pytest.skip("another order decides")

    def fill(self, tier: Tier) -> None:
        """Put objects until everything that may go has gone."""
        goal = tier.stats().num_evictions + 60
        for number in count(1000):
            store_object(tier, key_of(number), 100_000)
            if tier.stats().num_evictions >= goal:
                return
            assert number < 1000 + _MOST_PUTS

    def test_what_ranks_low_goes_first(self, tier: Tier) -> None:
        """By the labels that an object has now, whether it came before or after it was said how they rank."""
        self.capacity_of(tier)
        self.needs_labels(tier)
        self.needs_order()
        low, high, late, fallen = keys = [key_of(number) for number in range(4)]
        for key, labels in zip(keys, (b"1", b"9", b"", b"9"), strict=True):
            if key == late:
                tier.rank_by(lambda _key, labels: int(labels or b"5"))
            store_object(tier, key, 100_000, labels)
        tier.relabel(fallen, b"1")
        tier.touch([low, fallen])

        for number in count(1000):
            store_object(tier, key_of(number), 100_000)
            if tier.stats().num_evictions >= 2:
                break
            assert number < 1000 + _MOST_PUTS
        assert tier.find([low, fallen]) == [Presence.ABSENT] * 2
        assert tier.find([high, late]) == [Presence.PRESENT] * 2
        self.fill(tier)
        assert tier.find([late]) == [Presence.ABSENT]
        assert tier.find([high]) == [Presence.PRESENT]

    def test_what_is_not_there_cannot_be_held(self, tier: Tier) -> None:
        """Nor what a tier holds that holds nothing; to let it go is no error."""
        store_object(tier, key_of(1), 1000)

        assert tier.hold([key_of(2)]) == [False]
        assert tier.hold([]) == []
        tier.let_go([key_of(2), key_of(1)])

        self.assert_holds(tier, key_of(1), 1000)
        assert tier.stats().in_use_bytes == 0

    def test_what_is_held_stays(self, tier: Tier) -> None:
        """Whatever comes, held objects are there, can be got, and count as in use."""
        keys = self.holding(tier)
        assert tier.hold([*keys, key_of(99)]) == [True] * 4 + [False]

        self.fill(tier)

        for key in keys:
            assert self.got_labels(tier, key, 100_000) == b"pin"
        assert tier.stats().in_use_bytes >= 400_000
        assert tier.stats().in_use_bytes + tier.stats().reusable_bytes == tier.used_bytes

    def test_what_is_let_go_can_be_evicted(self, tier: Tier) -> None:
        """To hold twice is to hold once; to let go twice is to let go."""
        keys = self.holding(tier)
        self.needs_order()
        tier.hold(keys)
        tier.let_go(keys[:3])
        tier.let_go(keys[:3])
        tier.touch(keys)

        self.fill(tier)

        assert tier.find(keys) == [Presence.ABSENT] * 3 + [Presence.PRESENT]
        tier.let_go(keys)
        assert tier.stats().in_use_bytes == 0

    def test_what_is_held_can_be_deleted(self, tier: Tier) -> None:
        """A delete is a delete: its room is free, and what comes under its key is not held."""
        keys = self.holding(tier)
        self.needs_order()

        assert tier.delete(keys[:2]) == 2

        self.assert_lacks(tier, keys[0], 100_000)
        for key in keys[:2]:
            assert store_object(tier, key, 100_000) is PutOutcome.STORED
        self.fill(tier)
        assert tier.find(keys) == [Presence.ABSENT] * 2 + [Presence.PRESENT] * 2

    def test_labels_of_what_is_held_can_be_replaced(self, tier: Tier) -> None:
        """And it is held still."""
        keys = self.holding(tier)
        for key in keys:
            assert tier.relabel(key, b"other" * 1000)

        self.fill(tier)

        for key in keys:
            assert self.got_labels(tier, key, 100_000) == b"other" * 1000

    def test_no_room_is_no_room_beside_what_is_held(self, tier: Tier) -> None:
        """When all is held, puts are refused, and nothing of them stays; then they are taken again."""
        capacity = self.capacity_of(tier)
        stored: list[StoredKey] = []
        for number in count():
            if store_object(tier, key_of(number), 100_000) is not PutOutcome.STORED:
                break
            stored.append(key_of(number))
            if tier.hold([key_of(number)]) == [False]:
                pytest.skip("it holds nothing")
            assert number < capacity // 100_000 + 1

        assert store_object(tier, key_of(5000), 100_000) is PutOutcome.REFUSED
        self.assert_lacks(tier, key_of(5000), 100_000)
        assert tier.find(stored) == [Presence.PRESENT] * len(stored)
        tier.let_go(stored[:1])
        assert store_object(tier, key_of(5000), 100_000) is PutOutcome.STORED
        assert tier.find(stored[:2]) == [Presence.ABSENT, Presence.PRESENT]
