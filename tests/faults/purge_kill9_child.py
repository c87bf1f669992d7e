"""Processes that fill a disk with blocks and purge some of them, to be killed by purge_kill9.py.

What a process is about to do, and what it has done, is in its log: "S" when all blocks lie on the disk, "p"
and "P" before and after the purge has begun, "R" and two numbers, blocks and objects, when it is done.
"""

import os
import traceback
from hashlib import blake2b
from pathlib import Path
from time import sleep, time

from kvkeep.config import CacheOptions
from tests.faults.forked import fork_workers
from tests.lifetime_books import Clock
from tests.lifetime_cache import LifetimeCache, disk

NUM_BLOCKS = 40
NUM_TAGGED, NUM_OTHERS = 6, 2
_SIZE = 4


class WallClock(Clock):
    """The time of day."""

    def __call__(self) -> float:
        return time()


class _StableNumbers(dict[tuple[bytes | int, int], int]):
    """Numbers of prefixes that are the same in every process."""

    def setdefault(self, place: tuple[bytes | int, int], _default: int = 0) -> int:
        return int.from_bytes(blake2b(repr(place).encode(), digest_size=7).digest(), "little")


def open_cache(folder: Path) -> LifetimeCache:
    """A cache over a folder, in whichever process."""
    checked = LifetimeCache(WallClock(), tiers=[disk(folder)], room=1024)
    checked.store._prefixes = _StableNumbers()
    return checked


def tag_of(number: int) -> str:
    """The tag of what a round purges."""
    return f"round:{number}"


def prompts_of(number: int, *, tagged: bool) -> list[list[int]]:
    """The prompts of a round, full blocks all of them."""
    some = range(NUM_TAGGED) if tagged else range(NUM_TAGGED, NUM_TAGGED + NUM_OTHERS)
    return [[number, one, *[7] * (_SIZE * NUM_BLOCKS - 2)] for one in some]


def work(folder: str, number: str, log_path: str) -> None:
    """Fill, purge, and wait for the end."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        checked = open_cache(Path(folder))
        checked.admin.purges.wait_until_restored()
        for prompt in prompts_of(int(number), tagged=True):
            checked.serve(prompt, CacheOptions(tags=[tag_of(int(number))]))
        for prompt in prompts_of(int(number), tagged=False):
            checked.serve(prompt, CacheOptions())
        checked.cache.offload()
        os.write(log, b"S\n")
        os.write(log, b"p\n")
        purge = checked.admin.purges.begin(checked.query(tags=(tag_of(int(number)),)))
        os.write(log, b"P\n")
        while not purge.is_done:
            checked.cache.poll(is_busy=True)
            sleep(0.0005)
        receipt = purge.receipt()
        os.write(log, b"R %d %d\n" % (receipt.deleted, sum(receipt.stored.values())))
        while True:
            sleep(1)
    except BaseException:  # noqa: BLE001  nothing may go unseen, and the process ends with it
        traceback.print_exc()
        os.write(log, b"!\n")
        os._exit(1)


if __name__ == "__main__":
    fork_workers(work)
