"""kill -9 in the middle of purges: what the next start serves.

    python -m tests.faults.purge_kill9 --kills 500

Many rounds share a folder. Each starts a process (purge_kill9_child.py) that fills it and purges a part,
kills the process somewhere on the way, opens the folder and checks it.
"""

import argparse
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

from kvkeep.cache.lifetimes import decode_labels
from kvkeep.cache.lifetimes.journal import PurgeJournal
from kvkeep.config import CacheOptions
from kvkeep.tiers.disk import DiskTier
from tests.faults.kill9 import Nursery, kill
from tests.faults.purge_kill9_child import (
    NUM_BLOCKS,
    NUM_TAGGED,
    open_cache,
    prompts_of,
    tag_of,
)
from tests.lifetime_cache import MANY, LifetimeCache

_LONGEST_PURGE_S = 0.03
_LONGEST_WORK_S = 1.0
_PATIENCE_S = 60.0
# What they leave must fit into the folder, where nothing may be evicted; and each looks at all of it.
_ROUNDS_IN_FOLDER = 40


@dataclass(slots=True)
class Counts:
    """What a campaign did: kills, those during a purge, and objects that were left to the next start."""

    num_kills: int = 0
    num_midway: int = 0
    num_left: int = 0


class Campaign:
    """Rounds on one folder."""

    def __init__(
        self, nursery: Nursery, folder: Path, chooser: random.Random, counts: Counts
    ) -> None:
        self._nursery = nursery
        self._folder = folder / "cache"
        self._log = folder / "log"
        self._chooser = chooser
        self._kept: list[list[int]] = []
        self._purged: list[list[int]] = []
        self._round = 0
        self.counts = counts

    def round(self) -> None:
        """Kill, open and check once."""
        self._round += 1
        self._log.unlink(missing_ok=True)
        pid = self._nursery.start(self._folder, self._round, self._log)
        if self._chooser.random() < 0.8:
            self._wait_for_purge()
            sleep(self._chooser.uniform(0, _LONGEST_PURGE_S))
        else:
            sleep(self._chooser.uniform(0, _LONGEST_WORK_S))
        kill(pid)
        said = self._log.read_text().split("\n") if self._log.exists() else []
        assert "!" not in said, "a process failed by itself; standard error says why"
        self.counts.num_kills += 1
        is_begun, is_done = "P" in said, any(one.startswith("R") for one in said)
        self.counts.num_midway += is_begun and not is_done
        tagged, others = (prompts_of(self._round, tagged=one) for one in (True, False))
        if is_done:
            assert f"R {NUM_TAGGED * NUM_BLOCKS} {NUM_TAGGED * NUM_BLOCKS}" in said
        self._kept += others if "S" in said else []
        if is_begun:
            self._purged += tagged
        elif "S" in said and "p" not in said:
            self._kept += tagged
        self._check(is_begun=is_begun)

    def _check(self, *, is_begun: bool) -> None:
        num_left = self._num_tagged()
        if is_begun:
            self.counts.num_left += num_left
        checked = open_cache(self._folder)
        try:
            # At once, before anything that a start does beside can have been done.
            for prompt in self._purged:
                assert not any(checked.known(prompt)), "what was purged would be served"
            checked.admin.purges.wait_until_restored()
            for prompt in self._kept:
                assert all(checked.known(prompt)), "a block was lost that was not purged"
            for prompt in self._purged[-NUM_TAGGED:]:
                assert checked.serve([*prompt, 1], CacheOptions(write=False)) == len(prompt) + 1
            self._finish(checked)
            if is_begun:
                # What was deleted before the crash, and after it by the start, is not counted again.
                receipt = checked.admin.purges.purge(checked.query(tags=(tag_of(self._round),)))
                assert receipt.deleted == sum(receipt.stored.values()) == 0
            assert checked.cache.verify(tiers=True).ok
        finally:
            checked.cache.close()
        assert not is_begun or self._num_tagged() == 0

    def _finish(self, checked: LifetimeCache) -> None:
        until_s = monotonic() + _PATIENCE_S
        while PurgeJournal(self._folder).unfinished():
            assert monotonic() < until_s, "the journal does not come to its end"
            checked.cache.poll()
            sleep(0.001)

    def _num_tagged(self) -> int:
        """Objects on the disk with the tag of this round."""
        with DiskTier(self._folder, MANY) as tier:
            labels = [decode_labels(one.labels) for one in tier.labelled()]
        return sum(one is not None and tag_of(self._round) in one.tags for one in labels)

    def _wait_for_purge(self) -> None:
        until_s = monotonic() + _PATIENCE_S
        while not (self._log.exists() and b"p" in self._log.read_bytes()):
            assert monotonic() < until_s, "the process does not come to its purge"
            sleep(0.0005)


def run(*, kills: int, seed: int, budget_s: float = float("inf")) -> Counts:
    """So many kills, or as many as there is time for."""
    until_s = monotonic() + budget_s
    chooser, counts = random.Random(seed), Counts()
    nursery = Nursery("tests.faults.purge_kill9_child")
    try:
        while counts.num_kills < kills and monotonic() < until_s:
            most = min(kills, counts.num_kills + _ROUNDS_IN_FOLDER)
            with tempfile.TemporaryDirectory(prefix="purge-kill9-") as folder:
                campaign = Campaign(nursery, Path(folder), chooser, counts)
                while counts.num_kills < most and monotonic() < until_s:
                    campaign.round()
    finally:
        nursery.close()
    return counts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    options = parser.parse_args()
    start = monotonic()
    sys.stderr.write(f"seed {options.seed}\n")
    counts = run(kills=options.kills, seed=options.seed)
    sys.stdout.write(f"seed {options.seed}: {counts}, {monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
