"""How fast host and disk move objects, against bare copies and bare files of the same sizes. No torch."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Run, Script, alternate
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, PutOutcome, Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier

Bytes = NDArray[np.uint8]
_HEADER_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`host_mb` and `disk_mb` are moved in a round; `folder` is on the disk to measure, not the system's."""

    sizes: tuple[int, ...]
    host_mb: int
    disk_mb: int
    rounds: int
    folder: str | None
    at_least: float | None


class Objects:
    """Objects of one size: their bytes, and buffers for them. Each is a header page and a payload."""

    def __init__(self, size: int, total_bytes: int, seed: int) -> None:
        self.size = size
        self.number = max(2, total_bytes // size)
        generator = np.random.default_rng(seed)
        self.sources = generator.integers(0, 256, (self.number, size), dtype=np.uint8)
        self.targets = np.zeros_like(self.sources)
        self.parts = [_in_two(row) for row in self.sources]
        self.buffers = [_in_two(row) for row in self.targets]

    def keys(self, generation: int) -> list[StoredKey]:
        """Names that no other generation has."""
        head = generation.to_bytes(8, "big")
        return [StoredKey(head + at.to_bytes(25, "little")) for at in range(self.number)]

    def take(self) -> bool:
        """Whether the targets have the sources' bytes; they are cleared."""
        is_equal = bool(np.array_equal(self.sources, self.targets))
        self.targets[:] = 0
        return is_equal


def measure(run: Run, settings: Settings) -> None:
    """Each size by each medium, put and got."""
    for size in settings.sizes:
        what = f"{size >> 10} KiB"
        _measure_host(run, settings, Objects(size, settings.host_mb << 20, run.seed), what)
        objects = Objects(size, settings.disk_mb << 20, run.seed)
        with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
            _measure_disk(run, settings, objects, what, Path(folder))
    run.notes += [
        "raw host: np.copyto of each object, one after the other",
        "raw disk: open, writev, close and rename, or open, preadv and close; files stay in the page cache",
        "a tier puts a header page and a payload, as blocks come",
        "a full tier evicts an object for each that comes; raw disk then removes a file for each it writes",
    ]


def _measure_host(run: Run, settings: Settings, objects: Objects, what: str) -> None:
    memory = np.zeros_like(objects.sources)
    with HostTier(objects.sources.nbytes) as tier:
        sides = _Sides(tier, objects)
        sides.put_new(0)
        sides.get(0)
        run.check(f"host: {what}: what is got is what was put", holds=objects.take())

        def raw_put(_: int) -> float:
            return _timed_copies(memory, objects.sources)

        def raw_get(_: int) -> float:
            return _timed_copies(objects.targets, memory)

        _add(run, settings, f"host put, {what}", objects, raw_put, sides.put_new)
        _add(run, settings, f"host put, full, {what}", objects, raw_put, sides.put_more)
        _add(run, settings, f"host get, {what}", objects, raw_get, sides.get)
        run.check(f"host: {what}: the last bytes got are right", holds=objects.take())


def _measure_disk(run: Run, settings: Settings, objects: Objects, what: str, folder: Path) -> None:
    taken_bytes = (objects.size + 4096) * objects.number
    raw = _RawFiles(folder / "raw", objects)
    # Nothing is removed while new files are made, which would slow down one side or the other by chance.
    with DiskTier(folder / "new", 2 * (settings.rounds + 2) * taken_bytes) as tier:
        tier.wait_until_verified(60)
        _add(
            run, settings, f"disk put, {what}", objects, raw.put_new, _Sides(tier, objects).put_more
        )
    with DiskTier(folder / "full", taken_bytes) as tier:
        tier.wait_until_verified(60)
        sides = _Sides(tier, objects)
        for side in (sides, raw):
            side.put_more(0)
            side.get(0)
            run.check(f"disk and files: {what}: what is got is what was put", holds=objects.take())
        _add(run, settings, f"disk put, full, {what}", objects, raw.put_more, sides.put_more)
        _add(run, settings, f"disk get, {what}", objects, raw.get, sides.get)
        run.check(f"disk: {what}: the last bytes got are right", holds=objects.take())


def _add(
    run: Run,
    settings: Settings,
    what: str,
    objects: Objects,
    raw: Callable[[int], float],
    tier: Callable[[int], float],
) -> None:
    paired = alternate(raw, tier, rounds=settings.rounds, warmups=2)
    total_gb = objects.sources.nbytes / 1e9
    run.add(f"{what}: share of raw", paired.first_over_second(), "x", at_least=settings.at_least)
    run.add(f"{what}: raw", [total_gb / s for s in paired.first_s], "GB/s")
    run.add(f"{what}: tier", [total_gb / s for s in paired.second_s], "GB/s")


class _Sides:
    """What a tier is asked to do; each call is timed and moves all objects once."""

    def __init__(self, tier: Tier, objects: Objects) -> None:
        self._tier = tier
        self._objects = objects
        self._generations = count(1)
        self._keys: list[StoredKey] = []

    def put_new(self, _: int) -> float:
        """Into an empty tier."""
        self._tier.delete(self._keys)
        return self.put_more(0)

    def put_more(self, _: int) -> float:
        """Into a full one, where an object goes for each that comes."""
        self._keys = self._objects.keys(next(self._generations))
        size, put = self._objects.size, self._tier.put
        work = list(zip(self._keys, self._objects.parts, strict=True))
        start = perf_counter()
        outcomes = [put(key, parts, size) for key, parts in work]
        seconds = perf_counter() - start
        assert set(outcomes) == {PutOutcome.STORED}
        return seconds

    def get(self, _: int) -> float:
        """All that was put last."""
        get, work = self._tier.get, list(zip(self._keys, self._objects.buffers, strict=True))
        start = perf_counter()
        found = [get(key, buffers) for key, buffers in work]
        seconds = perf_counter() - start
        assert all(isinstance(one, Got) for one in found)
        return seconds


class _RawFiles:
    """The same with files and nothing else."""

    def __init__(self, folder: Path, objects: Objects) -> None:
        self._folder = folder
        self._objects = objects
        self._generations = count(1)
        self._paths: list[str] = []
        folder.mkdir()
        for at in range(256):
            (folder / f"{at:02x}").mkdir()

    def put_new(self, _: int) -> float:
        """Beside all that was written before."""
        self._paths = []
        return self.put_more(0)

    def put_more(self, _: int) -> float:
        """Removing a file for each that is written, if there are any."""
        generation = next(self._generations)
        paths = [
            f"{self._folder}/{at % 256:02x}/{generation}-{at}" for at in range(self._objects.number)
        ]
        olds: Sequence[str | None] = self._paths or [None] * len(paths)
        work = list(zip(paths, olds, self._objects.parts, strict=True))
        temporary, flags = f"{self._folder}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL
        start = perf_counter()
        for path, old, parts in work:
            if old is not None:
                os.unlink(old)  # noqa: PTH108  no more than the calls that are compared
            fd = os.open(temporary, flags, 0o600)
            os.writev(fd, parts)
            os.close(fd)
            os.replace(temporary, path)  # noqa: PTH105
        seconds = perf_counter() - start
        self._paths = paths
        return seconds

    def get(self, _: int) -> float:
        """All that was written last."""
        work = list(zip(self._paths, self._objects.buffers, strict=True))
        start = perf_counter()
        for path, buffers in work:
            fd = os.open(path, os.O_RDONLY)
            os.preadv(fd, buffers, 0)
            os.close(fd)
        return perf_counter() - start


def _timed_copies(targets: Bytes, sources: Bytes) -> float:
    work = list(zip(targets, sources, strict=True))
    start = perf_counter()
    for target, source in work:
        np.copyto(target, source)
    return perf_counter() - start


def _in_two(row: Bytes) -> list[memoryview]:
    view = row.data
    return [view[:_HEADER_BYTES], view[_HEADER_BYTES:]]


main = Script(
    name="tier_speed",
    claim="Host and disk move objects at 80 % and more of the speed of a bare copy and of bare files.",
    full=Settings(
        sizes=(64 << 10, 1 << 20, 4 << 20),
        host_mb=256,
        disk_mb=64,
        rounds=20,
        folder=None,
        at_least=0.8,
    ),
    quick=Settings(sizes=(64 << 10,), host_mb=4, disk_mb=4, rounds=2, folder=None, at_least=None),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
