"""How soon a large disk tier answers after a start: with its index, and without. No torch."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import perf_counter

from benchmarks.harness import Run, Script
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Presence
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.disk_files import ObjectFiles
from kvkeep.tiers.trailer import encode_tail

_MAKERS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`num_objects` of `object_bytes` each, as sparse files: their bytes are never read, their forms are."""

    num_objects: int
    object_bytes: int
    rounds: int
    at_most_s: float | None


def measure(run: Run, settings: Settings) -> None:
    """Open, find all keys and get one; then wait until all files were compared with the index."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        _make(path, settings)
        capacity_bytes = 2 * settings.num_objects * (settings.object_bytes + 8192)
        first, verified = [], []
        for number in range(settings.rounds):
            answered_s, verified_s = _start(run, settings, path, capacity_bytes, number)
            first.append(answered_s)
            verified.append(verified_s)
        run.add("open, find all, get one", first[1:], "s", at_most=settings.at_most_s)
        run.add("until all files were compared, in the background", verified[1:], "s")
        run.add("first start, without an index: until all files were read", verified[:1], "s")
        run.add("first start, without an index: open and get one", first[:1], "s")
        size_mb = (path / "index.sqlite").stat().st_size / 1e6
        run.notes.append(f"{settings.num_objects} objects; the index is {size_mb:.0f} MB")


def _start(
    run: Run, settings: Settings, path: Path, capacity_bytes: int, number: int
) -> tuple[float, float]:
    """Seconds to the first answer and to the end of the scan; the first start finds no index."""
    keys = [_key(at) for at in range(settings.num_objects)]
    wanted = keys[number * 7919 % len(keys)]
    buffer = bytearray(settings.object_bytes)
    begin = perf_counter()
    with DiskTier(path, capacity_bytes) as tier:
        found = tier.find(keys)
        got = tier.get(wanted, [memoryview(buffer)])
        answered_s = perf_counter() - begin
        run.check(
            f"start {number}: the object is got" + (", all are found" if number else ""),
            holds=got == Got(settings.object_bytes)
            and (number == 0 or found.count(Presence.PRESENT) == len(keys)),
        )
        is_verified = tier.wait_until_verified(600)
        verified_s = perf_counter() - begin
        run.check(
            f"start {number}: {len(keys)} objects after the scan",
            holds=is_verified and tier.stats().num_objects == len(keys),
        )
    return answered_s, verified_s


def _make(path: Path, settings: Settings) -> None:
    """The files of a tier, without its books."""
    files = ObjectFiles(str(path), is_durable=False)
    files.make_folders()
    trailer = encode_tail(settings.object_bytes, b"")

    for number in range(256):
        (path / "objects" / f"{number:02x}").mkdir()

    def make(first: int) -> None:
        for at in range(first, settings.num_objects, _MAKERS):
            fd = os.open(files.path(_key(at)), os.O_WRONLY | os.O_CREAT, 0o600)
            os.pwrite(fd, trailer, settings.object_bytes)
            os.close(fd)

    threads = [Thread(target=make, args=(first,)) for first in range(_MAKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _key(at: int) -> StoredKey:
    head = (at * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big")
    return StoredKey(head + at.to_bytes(25, "little"))


main = Script(
    name="disk_startup",
    claim="A disk tier of 100,000 objects and 20 GB gives its first answer within 2 s of its start.",
    full=Settings(num_objects=100_000, object_bytes=200_704, rounds=6, at_most_s=2.0),
    quick=Settings(num_objects=300, object_bytes=8192, rounds=3, at_most_s=None),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
