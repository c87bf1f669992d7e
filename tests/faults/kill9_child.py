"""Processes that put, relabel, delete and evict at full speed, to be killed by kill9.py.

What it is about to do, and what it has done, is in its log: lines of a letter, an object's number and, of
labels, their number. Small letters come before, capital ones after.
"""

import os
import random
import traceback
from concurrent.futures import ThreadPoolExecutor

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, cut, key_of, read_object
from kvkeep.tiers.base import Miss, PutOutcome
from kvkeep.tiers.disk import DiskTier
from tests.faults.forked import fork_workers

NUM_KEYS = 120
_MOST_BYTES = 40_000


def size_of(number: int) -> int:
    """The length of object `number`, the same in every process."""
    return 1 + number * 7919 % _MOST_BYTES


def labels_of(key: StoredKey, number: int) -> bytes:
    """Labels number `number` of an object: some need another block of the disk."""
    return b"%d of %s" % (number, key.hex().encode()) + bytes(number % 3 * 2500)


class Worker:
    """One thread's random calls."""

    def __init__(self, tier: DiskTier, log: int, seed: str) -> None:
        self._tier = tier
        self._log = log
        self._chooser = random.Random(seed)

    def run(self) -> None:
        """Go on until killed; what goes wrong is in the log, and ends the process."""
        does = (self._put, self._put, self._relabel, self._delete, self._get)
        try:
            while True:
                self._chooser.choice(does)(self._chooser.randrange(NUM_KEYS))
        except BaseException:  # noqa: BLE001  nothing may go unseen, and the process ends with it
            traceback.print_exc()
            self._say(b"! 0\n")
            os._exit(1)

    def _put(self, number: int) -> None:
        key, num_bytes = key_of(number), size_of(number)
        parts = cut(content_of(key, num_bytes), [num_bytes // 3, num_bytes // 2])
        labels = self._chooser.randrange(1000)
        self._say(b"p %d %d\n" % (number, labels))
        source = iter(parts) if number % 2 else parts
        outcome = self._tier.put(key, source, num_bytes, labels_of(key, labels))
        assert outcome is not PutOutcome.FAILED
        if outcome in (PutOutcome.STORED, PutOutcome.PRESENT):
            self._say(b"P %d\n" % number)

    def _relabel(self, number: int) -> None:
        labels = self._chooser.randrange(1000)
        self._say(b"l %d %d\n" % (number, labels))
        if self._tier.relabel(key_of(number), labels_of(key_of(number), labels)):
            self._say(b"L %d %d\n" % (number, labels))

    def _delete(self, number: int) -> None:
        self._say(b"d %d\n" % number)
        self._tier.delete([key_of(number)])
        self._say(b"D %d\n" % number)

    def _get(self, number: int) -> None:
        found = read_object(self._tier, key_of(number), size_of(number))
        assert isinstance(found, Miss) or found == content_of(key_of(number), size_of(number))

    def _say(self, line: bytes) -> None:
        os.write(self._log, line)


def work(folder: str, capacity_bytes: str, num_threads: str, seed: str, log_path: str) -> None:
    """Open the tier and go on until killed."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    tier = DiskTier(folder, int(capacity_bytes))
    with ThreadPoolExecutor(int(num_threads)) as pool:
        workers = [Worker(tier, log, f"{seed}:{at}") for at in range(int(num_threads))]
        for running in [pool.submit(worker.run) for worker in workers]:
            running.result()


if __name__ == "__main__":
    fork_workers(work)
