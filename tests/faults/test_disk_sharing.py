"""Several processes in one folder: each other's objects, one bound for all, and what the dead leave."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from time import monotonic, sleep

import pytest

from kvkeep.testing.tier_contents import (
    HeldParts,
    content_of,
    key_of,
    read_object,
    store_object,
)
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.disk_form import whole_blocks

ROOT = Path(__file__).resolve().parents[2]
NUM_BYTES = 10_000
TAKEN_BYTES = whole_blocks(NUM_BYTES)
CAPACITY = 20 * TAKEN_BYTES

# One that opens the folder, puts an object, says so, and waits.
OTHER_PROCESS = """
import sys
from kvkeep.testing.tier_contents import HeldParts, content_of, key_of, store_object
from kvkeep.tiers.disk import DiskTier
tier = DiskTier(sys.argv[1], int(sys.argv[2]))
store_object(tier, key_of(1), 10_000)
print("stored", flush=True)
def parts():
    yield memoryview(content_of(key_of(2), 10_000))[:5000]
    print("writing", flush=True)
    sys.stdin.read()
tier.put(key_of(2), parts(), 10_000)
"""


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[tuple[DiskTier, DiskTier]]:
    """Two tiers on one folder, as two processes have them: nothing in memory is shared."""
    with (
        DiskTier(tmp_path / "cache", CAPACITY, retry_s=0.2) as first,
        DiskTier(tmp_path / "cache", CAPACITY, retry_s=0.2) as second,
    ):
        yield first, second


def wait_until(holds: Callable[[], bool]) -> None:
    """Ask again and again, for some seconds at most."""
    until = monotonic() + 20
    while not holds():
        assert monotonic() < until, "it does not come to hold"
        sleep(0.02)


def files_bytes(tier: DiskTier) -> int:
    """What all files of objects take, unfinished ones included."""
    total = 0
    for path in [*tier.folder.glob("objects/*/*"), *tier.folder.glob("partial/*/*")]:
        try:
            total += whole_blocks(path.stat().st_size)
        except FileNotFoundError:
            continue
    return total


def test_each_gets_the_others_objects_at_once(tiers: tuple[DiskTier, DiskTier]) -> None:
    """A get asks the disk for what the mirror does not know."""
    first, second = tiers
    for number in range(5):
        store_object(first, key_of(number), NUM_BYTES)
        first.relabel(key_of(number), b"label %d" % number)

        assert read_object(second, key_of(number), NUM_BYTES) == content_of(
            key_of(number), NUM_BYTES
        )
        assert second.labels(key_of(number)) == b"label %d" % number
        assert store_object(second, key_of(number), NUM_BYTES) is PutOutcome.PRESENT
    assert first._shelf.ledger.total_bytes == 5 * TAKEN_BYTES


def test_each_learns_of_the_others_objects(tiers: tuple[DiskTier, DiskTier]) -> None:
    """Find sees, after a moment, what the other has put, relabelled and deleted."""
    first, second = tiers
    keys = [key_of(number) for number in range(6)]
    for key in keys:
        store_object(first, key, NUM_BYTES)
    wait_until(lambda: second.find(keys) == [Presence.PRESENT] * 6)

    first.relabel(keys[0], b"tag")
    wait_until(lambda: second.labels(keys[0]) == b"tag")
    second.delete(keys[3:])
    wait_until(lambda: first.find(keys) == [Presence.PRESENT] * 3 + [Presence.ABSENT] * 3)

    # The mirror of the other did not know of it when it was deleted.
    store_object(first, key_of(10), NUM_BYTES)
    assert second.delete([key_of(10)]) == 1
    assert isinstance(read_object(first, key_of(10), NUM_BYTES), Miss)
    assert first.stats().misses == {MissCause.ABSENT: 1}
    assert first.used_bytes == first._shelf.ledger.total_bytes == 3 * TAKEN_BYTES


def test_new_labels_come_with_the_next_get_of_the_other(tiers: tuple[DiskTier, DiskTier]) -> None:
    """A get reads them from the file; what the other holds, or reads, it holds on to."""
    first, second = tiers
    buffer = memoryview(bytearray(NUM_BYTES))
    store_object(first, key_of(1), NUM_BYTES, b"first")
    assert second.hold([key_of(1)]) == [True]

    for labels in (b"other", b"much longer" * 50, bytes(9000), b""):
        assert first.relabel(key_of(1), labels)
        assert second.get(key_of(1), [buffer]) == Got(NUM_BYTES, labels)
        wait_until(lambda: second.labels(key_of(1)) == labels)  # noqa: B023

    assert second.stats().in_use_bytes == second.used_bytes == TAKEN_BYTES
    for number in range(100, 140):
        store_object(second, key_of(number), NUM_BYTES)
    assert second.find([key_of(1)]) == [Presence.PRESENT]
    second.let_go([key_of(1)])
    assert second.stats().in_use_bytes == 0


def test_both_put_the_same_object(tiers: tuple[DiskTier, DiskTier]) -> None:
    """It is there once, and counted once, also when both wrote it at the same time."""
    first, second = tiers
    held = HeldParts(content_of(key_of(1), NUM_BYTES))
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(first.put, key_of(1), held, NUM_BYTES)
        assert held.is_begun.wait(30)
        assert store_object(second, key_of(1), NUM_BYTES) is PutOutcome.STORED
        held.release()

    assert put.result() is PutOutcome.PRESENT
    assert first._shelf.ledger.total_bytes == first.used_bytes == TAKEN_BYTES
    assert read_object(first, key_of(1), NUM_BYTES) == content_of(key_of(1), NUM_BYTES)


def test_the_bound_holds_for_both_together(tiers: tuple[DiskTier, DiskTier]) -> None:
    """What both write at full speed never takes more than the capacity, unfinished files included."""
    over: list[int] = []
    is_over = Event()

    def write(tier: DiskTier, seed: int) -> None:
        chooser = random.Random(seed)
        until = monotonic() + 2.0
        while monotonic() < until:
            number = chooser.randrange(200)
            store_object(tier, key_of(number), 500 + 137 * number)
            if chooser.random() < 0.1:
                tier.delete([key_of(chooser.randrange(200))])

    def watch() -> None:
        while not is_over.is_set():
            # A file that is renamed meanwhile may be counted twice; not the same one every time.
            if min(files_bytes(tiers[0]) for _ in range(3)) > CAPACITY:
                over.append(files_bytes(tiers[0]))

    with ThreadPoolExecutor(5) as pool:
        watching = pool.submit(watch)
        works = [pool.submit(write, tier, seed) for seed, tier in enumerate(tiers * 2)]
        for work in works:
            work.result()
        is_over.set()
        watching.result()

    assert over == []
    for tier in tiers:
        tier.verify()
    wait_until(lambda: tiers[0].used_bytes == tiers[1].used_bytes == files_bytes(tiers[0]))
    assert tiers[0]._shelf.ledger.total_bytes == files_bytes(tiers[0])
    assert tiers[0].stats().num_evictions + tiers[1].stats().num_evictions > 10


def test_what_one_does_not_know_of_makes_it_evict_more(tiers: tuple[DiskTier, DiskTier]) -> None:
    """The other's bytes count before the mirror has heard of its objects."""
    first, second = tiers
    for number in range(10):
        store_object(first, key_of(number), NUM_BYTES)
    for number in range(10, 30):
        assert store_object(second, key_of(number), NUM_BYTES) in (
            PutOutcome.STORED,
            PutOutcome.REFUSED,
        )
        assert files_bytes(second) <= CAPACITY
    assert second.stats().puts[PutOutcome.STORED] >= 10


def test_what_another_process_reads_stays_as_it_is(tiers: tuple[DiskTier, DiskTier]) -> None:
    """Evicted files are written over when nobody can have them open, and only then."""
    first, second = tiers
    store_object(second, key_of(1), NUM_BYTES)
    (path,) = first.folder.glob("objects/*/*")
    wait_until(lambda: first.find([key_of(1)]) == [Presence.PRESENT])
    with path.open("rb") as reader:
        for number in range(2, 40):
            store_object(first, key_of(number), NUM_BYTES)
        assert not path.exists()
        assert reader.read(NUM_BYTES) == content_of(key_of(1), NUM_BYTES)


def test_labels_of_what_the_other_removed_are_no_fault(tiers: tuple[DiskTier, DiskTier]) -> None:
    """The object is gone, which is not the medium's fault: nothing is switched off."""
    first, second = tiers
    store_object(first, key_of(1), NUM_BYTES)
    second.delete([key_of(1)])

    assert not first.relabel(key_of(1), b"tag")
    assert first.find([key_of(1)]) == [Presence.ABSENT]
    assert store_object(first, key_of(1), NUM_BYTES) is PutOutcome.STORED
    assert first.num_outages == 0


def test_a_smaller_capacity_holds(tmp_path: Path) -> None:
    """Where capacities differ, who has the smaller one makes room to it."""
    with DiskTier(tmp_path / "cache", CAPACITY) as large:
        for number in range(15):
            store_object(large, key_of(number), NUM_BYTES)
        with DiskTier(tmp_path / "cache", 5 * TAKEN_BYTES) as small:
            wait_until(lambda: files_bytes(small) == small.used_bytes == 5 * TAKEN_BYTES)
            # The ledger hears of what was removed once all of it is.
            wait_until(lambda: small._shelf.ledger.total_bytes == 5 * TAKEN_BYTES)
            wait_until(lambda: large.used_bytes == 5 * TAKEN_BYTES)
            assert files_bytes(small) == small._shelf.ledger.total_bytes == 5 * TAKEN_BYTES


def _start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(folder), str(CAPACITY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["stored\n", "writing\n"]
    return process


def test_what_a_dead_process_leaves_is_removed(tmp_path: Path) -> None:
    """While it lives its unfinished file stays; when it is dead, that goes, and its room is free again."""
    with DiskTier(tmp_path / "cache", CAPACITY, retry_s=0.2) as tier:
        other = _start(tier.folder)
        try:
            total = tier._shelf.ledger.total_bytes
            with DiskTier(tier.folder, CAPACITY):
                assert len(list(tier.folder.glob("partial/*"))) == 3
            assert total == 2 * TAKEN_BYTES
            assert tier._shelf.ledger.total_bytes == total
            assert len([path for path in tier.folder.glob("partial/*/*") if path.name == "0"]) == 0
            assert len([path for path in tier.folder.glob("partial/*/*") if path.name == "1"]) == 1
        finally:
            os.kill(other.pid, signal.SIGKILL)
            other.communicate()

        wait_until(lambda: tier._shelf.ledger.total_bytes == TAKEN_BYTES)
        assert len(list(tier.folder.glob("partial/*"))) == 1
        assert read_object(tier, key_of(1), NUM_BYTES) == content_of(key_of(1), NUM_BYTES)
        for number in range(10, 30):
            assert store_object(tier, key_of(number), NUM_BYTES) is PutOutcome.STORED
            assert files_bytes(tier) <= CAPACITY


def test_a_process_that_stops_in_the_ledger_blocks_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gets do not need the ledger; puts give up after a while, and work again when it goes on."""
    monkeypatch.setattr("kvkeep.tiers.disk_ledger._LOCK_WAIT_S", 0.2)
    with DiskTier(tmp_path / "cache", CAPACITY, retry_s=0.1) as tier:
        store_object(tier, key_of(1), NUM_BYTES)
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD_LEDGER, str(tier.folder / "ledger")],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            os.kill(holder.pid, signal.SIGSTOP)
            buffer = bytearray(NUM_BYTES)

            assert store_object(tier, key_of(2), NUM_BYTES) is PutOutcome.FAILED
            assert tier.get(key_of(1), [memoryview(buffer)]) == Got(NUM_BYTES)
            assert tier.num_outages == 1
        finally:
            holder.kill()
            holder.communicate()
        wait_until(lambda: store_object(tier, key_of(2), NUM_BYTES) is PutOutcome.STORED)
        assert tier.used_bytes == tier._shelf.ledger.total_bytes == 2 * TAKEN_BYTES


_HOLD_LEDGER = """
import fcntl, sys, time
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
