"""Host memory passes the suite of tiers; what else it promises."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from threading import Event

import pytest

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.testing.tier_suite import TierSuite
from kvkeep.tiers.base import Miss, PutOutcome, Tier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.host_pages import PageRuns, Run

PAGE = 4096


class TestHost(TierSuite):
    """The default policy."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        """Memory of its own for every call."""
        return HostTier(capacity_bytes)


class TestHostWithAnotherPolicy(TierSuite):
    """Segmented LRU: what was used twice outlives what was used once."""

    evicts_oldest_first = False

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        """Memory of its own for every call."""
        return HostTier(capacity_bytes, policy="slru")


def test_objects_take_whole_pages_and_nothing_else() -> None:
    """What is used is the pages that objects lie in, to the byte, and all of the capacity can be used."""
    with HostTier(10 * PAGE + 17) as tier:
        assert tier.capacity_bytes == 10 * PAGE
        for number, num_bytes in enumerate((1, PAGE, PAGE + 1, 3 * PAGE)):
            store_object(tier, key_of(number), num_bytes)
        assert tier.used_bytes == (1 + 1 + 2 + 3) * PAGE
        store_object(tier, key_of(9), 3 * PAGE)

        stats = tier.stats()
        assert tier.used_bytes == tier.capacity_bytes
        assert (stats.num_evictions, stats.free_bytes) == (0, 0)


def test_a_full_tier_in_pieces_still_takes_an_object_of_its_size() -> None:
    """Free pages need not lie together: an object is spread over what there is."""
    with HostTier(64 * PAGE) as tier:
        for number in range(64):
            store_object(tier, key_of(number), PAGE)
        tier.delete([key_of(number) for number in range(0, 64, 2)])

        outcome = store_object(tier, key_of(100), 32 * PAGE - 5)

        assert outcome is PutOutcome.STORED
        assert tier.stats().num_evictions == 0
        assert read_object(tier, key_of(100), 32 * PAGE - 5) == content_of(
            key_of(100), 32 * PAGE - 5
        )


def test_memory_is_asked_for_once_and_with_the_size_it_has() -> None:
    """What allocates page-locked memory gets one call; objects lie in what it returned."""
    asked: list[bytearray] = []

    def allocate(num_bytes: int) -> memoryview:
        asked.append(bytearray(num_bytes))
        return memoryview(asked[-1])

    with HostTier(5 * PAGE + 1, allocate=allocate) as tier:
        store_object(tier, key_of(1), 2 * PAGE)

    assert [len(memory) for memory in asked] == [5 * PAGE]
    assert content_of(key_of(1), 2 * PAGE) in bytes(asked[0])


def test_a_put_waits_for_pages_that_are_being_shown() -> None:
    """Room that another put has made, and not used, may still be in the hands of `on_evict`."""
    shown, go_on = Event(), Event()

    def spill(key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
        before = b"".join(parts)
        shown.set()
        assert go_on.wait(30)
        assert b"".join(parts) == before == content_of(key, 8 * PAGE)

    with HostTier(8 * PAGE) as tier, ThreadPoolExecutor(2) as pool:
        store_object(tier, key_of(0), 8 * PAGE)
        tier.on_evict = spill
        small = pool.submit(store_object, tier, key_of(1), PAGE)
        assert shown.wait(30)
        large = pool.submit(store_object, tier, key_of(2), 7 * PAGE)
        assert not large.done()
        go_on.set()

        assert small.result() is large.result() is PutOutcome.STORED
        for number, num_bytes in ((1, PAGE), (2, 7 * PAGE)):
            assert read_object(tier, key_of(number), num_bytes) == content_of(
                key_of(number), num_bytes
            )


def test_a_spill_that_raises_loses_no_room() -> None:
    """Its error reaches who put; victims are gone, and their pages are free."""

    def spill(key: StoredKey, parts: Sequence[memoryview], labels: bytes) -> None:
        raise LookupError("nowhere to spill")

    with HostTier(8 * PAGE) as tier:
        for number in range(8):
            store_object(tier, key_of(number), PAGE)
        tier.on_evict = spill
        with pytest.raises(LookupError, match="nowhere"):
            store_object(tier, key_of(10), 3 * PAGE)
        tier.on_evict = None

        assert tier.stats().num_objects == 5
        assert tier.used_bytes == 5 * PAGE
        assert store_object(tier, key_of(11), 8 * PAGE) is PutOutcome.STORED


def test_many_sizes_do_not_fall_to_pieces() -> None:
    """After thousands of objects of all sizes a large one still lies in a few runs of pages."""
    chooser = Random(3)
    with HostTier(2048 * PAGE) as tier:
        for number in range(3000):
            num_bytes = chooser.choice([PAGE, 5 * PAGE, 17 * PAGE, 100 * PAGE])
            assert tier.put(key_of(number), _zeros(num_bytes), num_bytes) is PutOutcome.STORED
            if chooser.random() < 0.2:
                tier.delete([key_of(max(0, number - chooser.randrange(20)))])
        places = list(tier._key_to_place.values())

    num_runs = [len(place.runs) for place in places if place.num_bytes == 100 * PAGE]
    assert len(num_runs) > 5
    assert sum(num_runs) / len(num_runs) < 8


def test_free_pages_are_joined_again() -> None:
    """Whatever was taken and given back in whatever order: no page is given out twice, and none is lost."""
    chooser, runs = Random(5), PageRuns(200)
    taken: list[tuple[Run, ...]] = []
    for _ in range(3000):
        if chooser.random() < 0.5 and runs.num_free:
            num_pages = chooser.randint(1, min(60, runs.num_free))
            taken.append(runs.take(num_pages))
            assert sum(run.num_pages for run in taken[-1]) == num_pages
        elif taken:
            runs.give_back(taken.pop(chooser.randrange(len(taken))))
        pages = [page for place in taken for run in place for page in _pages(run)]
        assert len(set(pages)) == len(pages) == 200 - runs.num_free
        # As many runs as there are stretches of free pages.
        free = sorted(set(range(200)) - set(pages))
        assert len(runs) == sum(page - 1 not in free for page in free)


def _pages(run: Run) -> range:
    return range(run.first, run.first + run.num_pages)


@pytest.mark.parametrize("is_put", [True, False], ids=["put", "get"])
def test_other_threads_run_while_bytes_are_copied(is_put: bool) -> None:
    """A copy does not hold the lock of the interpreter: beside it, another thread sees half of it."""
    size = 128 << 20
    memory, buffer, source = bytearray(size), bytearray(size), b"\1" * size
    target = memory if is_put else buffer
    is_over, half_seen = Event(), Event()

    def watch() -> None:
        while not is_over.is_set() and not half_seen.is_set():
            if target[0] and not target[-1]:
                half_seen.set()

    with (
        HostTier(size, allocate=lambda _: memoryview(memory)) as tier,
        ThreadPoolExecutor(1) as pool,
    ):
        if not is_put:
            tier.put(key_of(1), [memoryview(source)], size)
        watching = pool.submit(watch)
        if is_put:
            tier.put(key_of(1), [memoryview(source)], size)
        else:
            tier.get(key_of(1), [memoryview(buffer)])
        is_over.set()
        watching.result()

    assert half_seen.is_set()


@pytest.mark.parametrize("capacity_bytes", [0, -1, 4095, 1 << 62])
def test_a_capacity_that_cannot_be_is_refused(capacity_bytes: int) -> None:
    """The error names the field and its value."""
    with pytest.raises(ConfigError, match=f"capacity_bytes={capacity_bytes}"):
        HostTier(capacity_bytes)


def _zeros(num_bytes: int) -> list[memoryview]:
    return [memoryview(bytes(num_bytes))]


def test_the_memory_goes_with_the_tier() -> None:
    """Closing gives the memory back, also when objects are in it."""
    memory = bytearray(8 * PAGE)
    tier = HostTier(8 * PAGE, allocate=lambda _: memoryview(memory))
    store_object(tier, key_of(1), PAGE)

    tier.close()

    # A bytearray that somebody still looks at cannot change its size.
    memory.extend(b"more")
    assert isinstance(read_object(tier, key_of(1), PAGE), Miss)
