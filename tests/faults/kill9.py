"""kill -9 at random instants: what a disk tier is when it is opened again.

    python -m tests.faults.kill9 --kills 2000

Each round starts processes (kill9_child.py) on a folder that lives through all rounds, kills them somewhere
between the opening of the tier and its thousandth object, opens the folder and checks it.
"""

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, key_of, read_object
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.disk_form import read_form, whole_blocks
from tests.faults.kill9_child import NUM_KEYS, labels_of, size_of

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_WORK_S = 0.06
_ROOMY, _TIGHT = 1 << 30, 600_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What is killed: processes with threads, on a folder with a capacity."""

    name: str
    num_processes: int
    num_threads: int
    capacity_bytes: int


SCENES = (
    # Nothing is evicted, and one thread does one thing after the other: all that was done must be there.
    Scene(name="roomy", num_processes=1, num_threads=1, capacity_bytes=_ROOMY),
    Scene(name="tight", num_processes=1, num_threads=3, capacity_bytes=_TIGHT),
    Scene(name="shared", num_processes=2, num_threads=2, capacity_bytes=_TIGHT),
)


@dataclass(slots=True)
class Known:
    """What the log says of an object: the labels it may have, None where it may be absent."""

    states: set[bytes | None] = field(default_factory=lambda: {None})


@dataclass(slots=True)
class Counts:
    """What a campaign did."""

    num_kills: int = 0
    num_objects: int = 0
    num_checked_bytes: int = 0
    num_unfinished: int = 0


class Nursery:
    """A process that forks the ones to be killed, since a new interpreter takes longer than a round."""

    def __init__(self, module: str = "tests.faults.kill9_child") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *words: object) -> int:
        """The process id of a new worker, which is told these words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def kill(pid: int) -> None:
    """End a process at once, and wait until it is gone."""
    with suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.SIGKILL)
            sleep(0.0005)


class Campaign:
    """Rounds of one scene on one folder."""

    def __init__(self, scene: Scene, nursery: Nursery, folder: Path, seed: int) -> None:
        self.scene = scene
        self._nursery = nursery
        self.folder = folder / "cache"
        self.counts = Counts()
        self._seed = f"{scene.name}:{seed}"
        self._chooser = random.Random(self._seed)
        self._logs = folder
        self._known = {key_of(number): Known() for number in range(NUM_KEYS)}
        self._round = 0

    def round(self) -> None:
        """Kill, open and check once."""
        self._round += 1
        victims = {}
        for at in range(self.scene.num_processes):
            log = self._logs / f"log-{self._round}-{at}"
            seed = f"{self._seed}:{self._round}:{at}"
            scene = self.scene
            words = (self.folder, scene.capacity_bytes, scene.num_threads, seed, log)
            victims[self._nursery.start(*words)] = log
        for pid, log in victims.items():
            sleep(self._chooser.uniform(0, _LONGEST_WORK_S))
            kill(pid)
            self.counts.num_kills += 1
            if log.exists():
                self._replay(log)
        self.counts.num_unfinished += len(_unfinished(self.folder))
        with DiskTier(self.folder, self.scene.capacity_bytes) as tier:
            if self._chooser.random() < 0.15:
                assert tier.wait_until_verified(60)
            report = tier.verify()
            assert report.num_strange == report.num_wrong == 0, report
            self._check(tier)
        _check_index(self.folder)

    def _check(self, tier: DiskTier) -> None:
        files = _files(self.folder)
        objects = {item.key: item.num_bytes for item in tier.objects()}
        used = sum(whole_blocks(path.stat().st_size) for path in files.values())
        assert objects.keys() == files.keys()
        counted = (tier.used_bytes, tier._shelf.ledger.total_bytes)
        assert counted == (used, used), f"the files have {used}, mirror and ledger {counted}"
        assert used <= self.scene.capacity_bytes
        assert len(_unfinished(self.folder)) == 0
        assert not list((self.folder / "quarantine").iterdir())
        for number in range(NUM_KEYS):
            key, num_bytes = key_of(number), size_of(number)
            if key in objects:
                assert objects[key] == num_bytes
                assert read_object(tier, key, num_bytes) == content_of(key, num_bytes)
                self.counts.num_checked_bytes += num_bytes
            self._check_state(tier, key)
        self.counts.num_objects += len(objects)

    def _check_state(self, tier: DiskTier, key: StoredKey) -> None:
        known, labels = self._known[key], tier.labels(key)
        if self.scene.name == "roomy":
            assert labels in known.states, (labels, known.states)
        known.states = {labels}

    def _replay(self, log: Path) -> None:
        """What each object may be after all that was done, and after what was begun."""
        for line in log.read_bytes().splitlines():
            letter, *numbers = line.split()
            assert letter != b"!", "a process failed by itself; standard error says why"
            key = key_of(int(numbers[0]))
            known = self._known[key]
            match letter:
                case b"p" if None in known.states:
                    known.states |= {labels_of(key, int(numbers[1]))}
                case b"P":
                    known.states.discard(None)
                case b"l" if known.states != {None}:
                    known.states |= {labels_of(key, int(numbers[1]))}
                case b"L":
                    known.states = {labels_of(key, int(numbers[1]))}
                case b"d":
                    known.states |= {None}
                case b"D":
                    known.states = {None}
        log.unlink()


def _files(folder: Path) -> dict[StoredKey, Path]:
    return {StoredKey(bytes.fromhex(path.name)): path for path in folder.glob("objects/??/*")}


def _unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.glob("partial/*/*") if path.name != "alive"]


def _check_index(folder: Path) -> None:
    """Rows are what the files say of themselves, and no process has a folder left."""
    connection = sqlite3.connect(folder / "index.sqlite")
    try:
        rows = connection.execute("SELECT key, num_bytes, labels, stamp FROM objects").fetchall()
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    finally:
        connection.close()
    said = {}
    for key, path in _files(folder).items():
        form = read_form(str(path))
        assert form is not None
        said[key] = (form.num_bytes, form.labels, form.stamp)
    assert {key: tuple(rest) for key, *rest in rows} == said
    assert verdict == "ok"
    assert not list((folder / "partial").iterdir())


def run(
    scenes: Sequence[Scene], *, kills: int, seed: int, budget_s: float = float("inf")
) -> Counts:
    """So many kills for all scenes together, or as many as there is time for."""
    total, until = Counts(), monotonic() + budget_s
    for at, scene in enumerate(scenes):
        end = monotonic() + (until - monotonic()) / (len(scenes) - at)
        with tempfile.TemporaryDirectory(prefix="kill9-") as folder:
            nursery = Nursery()
            campaign = Campaign(scene, nursery, Path(folder), seed)
            try:
                while campaign.counts.num_kills < kills / len(scenes) and monotonic() < end:
                    campaign.round()
            finally:
                nursery.close()
        for name in ("num_kills", "num_objects", "num_checked_bytes", "num_unfinished"):
            setattr(total, name, getattr(total, name) + getattr(campaign.counts, name))
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--scene", choices=[scene.name for scene in SCENES])
    options = parser.parse_args()
    scenes = [scene for scene in SCENES if options.scene in (None, scene.name)]
    start = monotonic()
    counts = run(scenes, kills=options.kills, seed=options.seed)
    sys.stdout.write(f"seed {options.seed}: {counts}, {monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
