"""A disk passes the suite of tiers."""

import resource
from pathlib import Path

import pytest

from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.testing.tier_suite import TierSuite
from kvkeep.tiers.base import PutOutcome, Tier
from kvkeep.tiers.disk import DiskTier


class TestDisk(TierSuite):
    """As it is by default."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        """The tier in that folder."""
        return DiskTier(folder / "cache", capacity_bytes)


class TestDurableDisk(TierSuite):
    """With a wait for the disk after every put."""

    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        """The tier in that folder."""
        return DiskTier(folder / "cache", capacity_bytes, durable=True)


@pytest.mark.parametrize("new_bytes", [1, 7_000, 20_000, 28_000, 28_672, 50_000])
def test_a_new_object_is_written_over_an_evicted_one(tmp_path: Path, new_bytes: int) -> None:
    """Whatever the two lengths: of the old object and its labels nothing is left, nor is a file."""
    with DiskTier(tmp_path / "cache", 2 * 28_672) as tier:
        store_object(tier, key_of(0), 28_000)
        tier.relabel(key_of(0), b"label" * 100)
        store_object(tier, key_of(1), 28_000)
        old = {path.stat().st_ino for path in tier.folder.glob("objects/*/*")}

        assert store_object(tier, key_of(5), new_bytes) is PutOutcome.STORED

        files = {path.name: path.stat() for path in tier.folder.glob("objects/*/*")}
        assert files[key_of(5).hex()].st_ino in old
        assert read_object(tier, key_of(5), new_bytes) == content_of(key_of(5), new_bytes)
        assert tier.labels(key_of(5)) == b""
        assert tier.verify().is_clean
        assert tier.used_bytes == sum(-(-file.st_size // 4096) * 4096 for file in files.values())
        assert [path.name for path in tier.folder.glob("partial/*/*")] == ["alive"]


def test_labels_are_written_in_place_while_they_fit(tmp_path: Path) -> None:
    """No copy of the object is made, and all is the same when it is opened again, also without its index."""
    with DiskTier(tmp_path / "cache", 10 << 20) as tier:
        store_object(tier, key_of(1), 28_672, b"first")
        (path,) = tier.folder.glob("objects/*/*")
        inode = path.stat().st_ino
        for labels in (b"second" * 100, b"third"):
            assert tier.relabel(key_of(1), labels)
            assert path.stat().st_ino == inode
        assert tier.relabel(key_of(1), bytes(5000))
        assert path.stat().st_ino != inode
        assert tier.relabel(key_of(1), b"last")
        used_bytes = tier.used_bytes
        assert (
            used_bytes == tier._shelf.ledger.total_bytes == -(-path.stat().st_size // 4096) * 4096
        )
        assert tier.verify().is_clean

    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (tmp_path / "cache" / name).unlink(missing_ok=True)
    with DiskTier(tmp_path / "cache", 10 << 20) as tier:
        assert [item.labels for item in tier.labelled()] == [b"last"]
        assert read_object(tier, key_of(1), 28_672) == content_of(key_of(1), 28_672)
        assert tier.used_bytes == used_bytes


def test_all_labels_are_those_of_the_files(tmp_path: Path) -> None:
    """What the index does not know yet is in a listing all the same: files, labels, and what has gone."""
    with DiskTier(tmp_path / "cache", 10 << 20) as tier:
        for number in range(300):
            store_object(tier, key_of(number), 100, b"old")
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").glob("index.sqlite*")}
    with DiskTier(tmp_path / "cache", 10 << 20) as tier:
        for number in range(50):
            tier.relabel(key_of(number), b"new")
        tier.delete([key_of(number) for number in range(50, 100)])
        store_object(tier, key_of(1000), 100, b"added")
    for path, content in kept.items():
        path.write_bytes(content)

    with DiskTier(tmp_path / "cache", 10 << 20) as tier:
        labels = {item.key: item.labels for item in tier.labelled()}

    expected = {key_of(number): b"new" if number < 50 else b"old" for number in range(300)}
    for number in range(50, 100):
        del expected[key_of(number)]
    assert labels == {**expected, key_of(1000): b"added"}


def test_any_number_of_objects_can_go_at_once(tmp_path: Path) -> None:
    """Few files are open at a time, however many are deleted, or evicted for one large object."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with DiskTier(tmp_path / "cache", 500 * 4096) as tier:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
        try:
            for number in range(500):
                assert store_object(tier, key_of(number), 100) is PutOutcome.STORED
            assert store_object(tier, key_of(1000), 250 * 4096) is PutOutcome.STORED
            assert tier.stats().num_evictions == 251
            assert tier.delete([key_of(number) for number in range(500)]) == 249
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

        assert tier.used_bytes == tier._shelf.ledger.total_bytes == 251 * 4096
        assert [path.name for path in tier.folder.glob("objects/*/*")] == [key_of(1000).hex()]
