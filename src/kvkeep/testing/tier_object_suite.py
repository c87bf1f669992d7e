"""The part of the tier suite that follows one object: put, got, in flight, deleted."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_checks import TierChecks
from kvkeep.testing.tier_contents import (
    HeldParts,
    content_of,
    cut,
    key_of,
    read_object,
    store_object,
)
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome, Tier

__all__ = ["TierObjectSuite"]

_SIZES = (1, 3, 4095, 4096, 4097, 69_632, 1_000_003)
_WAIT_S = 30.0


class TierObjectSuite(TierChecks):
    """Use TierSuite, which has these tests and more."""

    @pytest.mark.parametrize("num_bytes", _SIZES)
    def test_an_object_comes_back_however_it_is_cut(self, tier: Tier, num_bytes: int) -> None:
        """Parts and buffers may be cut in different places, and some may be empty."""
        key, middle = key_of(1), num_bytes // 3
        parts = cut(content_of(key, num_bytes), [0, middle, middle, num_bytes])
        buffer = bytearray(num_bytes)

        outcome = tier.put(key, parts, num_bytes)
        got = tier.get(key, cut(buffer, [num_bytes // 2, num_bytes // 2, num_bytes - 1]))

        assert (outcome, got) == (PutOutcome.STORED, Got(num_bytes))
        assert not self.keeps_bytes or bytes(buffer) == content_of(key, num_bytes)

    def test_many_small_parts_are_one_object(self, tier: Tier) -> None:
        """Neither side has a limit on the number of parts."""
        key, num_bytes = key_of(1), 5000
        buffer = bytearray(num_bytes)

        outcome = tier.put(key, cut(content_of(key, num_bytes), range(num_bytes)), num_bytes)
        got = tier.get(key, cut(buffer, range(0, num_bytes, 2)))

        assert (outcome, got) == (PutOutcome.STORED, Got(num_bytes))
        assert not self.keeps_bytes or bytes(buffer) == content_of(key, num_bytes)

    def test_views_of_numbers_are_bytes(self, tier: Tier) -> None:
        """A part or buffer counts its bytes, whatever its items are."""
        key, content = key_of(1), content_of(key_of(1), 4096)
        buffer = bytearray(4096)

        outcome = tier.put(key, iter([memoryview(content).cast("I")]), 4096)
        got = tier.get(key, [memoryview(buffer).cast("H")])

        assert (outcome, got) == (PutOutcome.STORED, Got(4096))
        assert not self.keeps_bytes or bytes(buffer) == content

    @pytest.mark.parametrize("wanted_bytes", [1, 9_999, 10_001, 50_000])
    def test_another_length_is_a_miss(self, tier: Tier, wanted_bytes: int) -> None:
        """An object that does not fill the buffers exactly is SHORT, and is not harmed."""
        key = key_of(1)
        store_object(tier, key, 10_000)

        found = read_object(tier, key, wanted_bytes)

        assert isinstance(found, Miss)
        assert found.cause is MissCause.SHORT
        self.assert_holds(tier, key, 10_000)

    def test_what_was_never_put_is_absent(self, tier: Tier) -> None:
        """A key that nobody put is found nowhere, and nothing can be done to it."""
        store_object(tier, key_of(1), 100)

        self.assert_lacks(tier, key_of(2), 100)
        assert tier.delete([key_of(2)]) == 0
        assert tier.labels(key_of(2)) is None
        assert not tier.relabel(key_of(2), b"new")
        tier.touch([key_of(2)])
        self.assert_lacks(tier, key_of(2), 100)

    def test_a_present_key_keeps_its_bytes(self, tier: Tier) -> None:
        """A second put of a key changes nothing: content has one name."""
        key = key_of(1)
        store_object(tier, key, 5000)

        outcome = tier.put(key, [memoryview(bytes(5000))], 5000)

        assert outcome is PutOutcome.PRESENT
        self.assert_holds(tier, key, 5000)

    def test_many_keys_are_found_at_once(self, tier: Tier) -> None:
        """`find` answers in the order of the keys it is given."""
        keys = [key_of(number) for number in range(300)]
        for key in keys[::3]:
            assert store_object(tier, key, 700) is PutOutcome.STORED

        found = tier.find(keys)

        expected = [Presence.PRESENT, Presence.ABSENT, Presence.ABSENT] * 100
        assert found == expected
        assert tier.find([]) == []

    # ------------------------------------------------------------------------ writes in flight

    @contextmanager
    def writing(
        self, tier: Tier, key: StoredKey, num_bytes: int, labels: bytes = b""
    ) -> Iterator[Future[PutOutcome]]:
        """A put that has taken its first part; it gets the rest when the block ends."""
        self.needs_bytes()
        held = HeldParts(content_of(key, num_bytes))
        with ThreadPoolExecutor(1) as pool:
            put = pool.submit(tier.put, key, held, num_bytes, labels)
            try:
                assert held.is_begun.wait(_WAIT_S), "the put did not begin"
                yield put
            finally:
                held.release()

    def test_a_write_in_flight_cannot_be_got(self, tier: Tier) -> None:
        """Nothing is visible before its bytes are; a local tier says that it is coming."""
        key, is_local = key_of(1), tier.capabilities.is_local

        with self.writing(tier, key, 10_000) as put:
            (presence,) = tier.find([key])
            found = read_object(tier, key, 10_000)
            listed = list(tier.objects())
            again = store_object(tier, key, 10_000) if is_local else None

        assert presence is not Presence.PRESENT
        assert presence is Presence.IN_FLIGHT or not is_local
        assert isinstance(found, Miss)
        assert listed == []
        assert again in (None, PutOutcome.PRESENT)
        assert put.result() is PutOutcome.STORED
        self.assert_holds(tier, key, 10_000)

    @pytest.mark.parametrize("num_short", [1, 4000, -1])
    @pytest.mark.parametrize("is_lazy", [False, True])
    def test_parts_of_another_length_leave_nothing(
        self, tier: Tier, num_short: int, *, is_lazy: bool
    ) -> None:
        """Parts that end early, or go on, are no object; the key can be put right afterwards."""
        self.needs_bytes()
        key = key_of(1)
        parts = cut(bytes(5000 - num_short), [100])

        outcome = tier.put(key, iter(parts) if is_lazy else parts, 5000)

        assert outcome not in (PutOutcome.STORED, PutOutcome.PRESENT)
        self.assert_lacks(tier, key, 5000)
        assert store_object(tier, key, 5000) is PutOutcome.STORED
        self.assert_holds(tier, key, 5000)

    @pytest.mark.parametrize("kind", [LookupError, OSError])
    def test_parts_that_raise_leave_nothing(self, tier: Tier, kind: type[Exception]) -> None:
        """What the parts raise reaches the caller, and is no fault of the medium; nothing stays."""
        self.needs_bytes()
        key = key_of(1)

        def failing() -> Iterator[memoryview]:
            yield memoryview(bytes(2500))
            raise kind("the source failed")

        with pytest.raises(kind, match="the source failed"):
            tier.put(key, failing(), 5000)

        self.assert_lacks(tier, key, 5000)
        assert store_object(tier, key, 5000) is PutOutcome.STORED
        self.assert_holds(tier, key, 5000)

    # ---------------------------------------------------------------------------------- delete

    def test_what_is_deleted_is_gone(self, tier: Tier) -> None:
        """Delete counts what was there, and only that goes; it can be put again."""
        for number in range(4):
            store_object(tier, key_of(number), 3000)

        assert tier.delete([key_of(0), key_of(7), key_of(2)]) == 2

        for number in (0, 2):
            self.assert_lacks(tier, key_of(number), 3000)
        for number in (1, 3):
            self.assert_holds(tier, key_of(number), 3000)
        assert store_object(tier, key_of(2), 3000) is PutOutcome.STORED
        self.assert_holds(tier, key_of(2), 3000)

    def test_a_write_in_flight_can_be_deleted(self, tier: Tier) -> None:
        """What is deleted while it is written is not there afterwards."""
        key = key_of(1)

        with self.writing(tier, key, 10_000) as put:
            num_deleted = tier.delete([key])

        put.result()
        assert num_deleted == 1
        self.assert_lacks(tier, key, 10_000)
        assert store_object(tier, key, 10_000) is PutOutcome.STORED
        self.assert_holds(tier, key, 10_000)

    def test_who_reads_what_is_deleted_reads_it_to_its_end(self, tier: Tier) -> None:
        """A get beside deletes and new puts has the right bytes, or is a miss."""
        key, num_bytes = key_of(1), 1 << 20
        content, is_over = content_of(key_of(1), 1 << 20), Event()

        def read() -> None:
            while not is_over.is_set():
                found = read_object(tier, key, num_bytes)
                assert isinstance(found, Miss) or not self.keeps_bytes or found == content

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for _ in range(30):
                    tier.put(key, [memoryview(content)], num_bytes)
                    tier.delete([key])
            finally:
                is_over.set()
            for reader in readers:
                reader.result()

        self.assert_lacks(tier, key, num_bytes)
