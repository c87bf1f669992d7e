"""Disks that are full, read-only, failing or gone: puts fail, gets miss, and it recovers by itself."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest

from kvkeep.errors import ConfigError, TierError
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.disk_form import whole_blocks
from tests.faults.disk_mounts import failing_disk, read_only, small_disk

NUM_BYTES = 100_000
RETRY_S = 0.3


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of, as it grows."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    logging.getLogger("kvkeep").addHandler(Collector())
    return found


@pytest.fixture(autouse=True)
def _no_handlers_stay() -> Iterator[None]:
    logger = logging.getLogger("kvkeep")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


def assert_equal_to_files(tier: DiskTier) -> None:
    """The books are what is on the disk, and the bound holds."""
    files = list(tier.folder.glob("objects/*/*"))
    assert {item.key.hex() for item in tier.objects()} == {path.name for path in files}
    used = sum(whole_blocks(path.stat().st_size) for path in files)
    assert (tier.used_bytes, tier._shelf.ledger.total_bytes) == (used, used)
    assert used <= tier.capacity_bytes
    assert [path.name for path in tier.folder.glob("partial/*/*")] == ["alive"]


def wait_for_put(tier: DiskTier, number: int) -> None:
    """Put until it works."""
    until = monotonic() + 20
    while store_object(tier, key_of(number), NUM_BYTES) is not PutOutcome.STORED:
        assert monotonic() < until, "it does not recover"
        sleep(0.05)


def is_right(tier: DiskTier, number: int) -> bool:
    """Whether the object is there, with its bytes."""
    found = read_object(tier, key_of(number), NUM_BYTES)
    assert isinstance(found, Miss) or found == content_of(key_of(number), NUM_BYTES)
    return not isinstance(found, Miss)


def test_a_full_disk(tmp_path: Path, warnings: list[str]) -> None:
    """What does not fit fails without a trace; what is there is served; room that is made is used."""
    with (
        small_disk(tmp_path, 4 << 20) as disk,
        DiskTier(disk / "cache", 1 << 30, retry_s=RETRY_S) as tier,
    ):
        outcomes = [store_object(tier, key_of(number), NUM_BYTES) for number in range(60)]

        num_stored = outcomes.count(PutOutcome.STORED)
        assert num_stored > 20
        assert set(outcomes[num_stored:]) == {PutOutcome.FAILED}
        assert all(is_right(tier, number) for number in range(num_stored))
        assert not any(is_right(tier, number) for number in range(num_stored, 60))
        assert_equal_to_files(tier)
        assert len(warnings) == tier.num_outages == 1
        assert "No space left" in warnings[0]

        sleep(RETRY_S)
        assert store_object(tier, key_of(100), NUM_BYTES) is PutOutcome.FAILED
        tier.delete([key_of(number) for number in range(10)])
        wait_for_put(tier, 101)

        assert is_right(tier, 101)
        assert_equal_to_files(tier)
        assert len(warnings) == 1
        assert not any(tier.relabel(key_of(20), bytes(1 << 20)) for _ in range(3))
        assert tier.labels(key_of(20)) == b""


def test_a_disk_that_becomes_read_only(tmp_path: Path, warnings: list[str]) -> None:
    """Objects are served, none is taken; what is deleted is not found again, and goes when it can."""
    with DiskTier(tmp_path / "cache", 1 << 30, retry_s=RETRY_S) as tier:
        for number in range(5):
            store_object(tier, key_of(number), NUM_BYTES)
        with read_only(tier.folder):
            assert store_object(tier, key_of(10), NUM_BYTES) is PutOutcome.FAILED
            assert not tier.relabel(key_of(1), b"tag")
            sleep(RETRY_S)
            assert store_object(tier, key_of(10), NUM_BYTES) is PutOutcome.FAILED
            assert tier.delete([key_of(0), key_of(99)]) == 1
            assert not is_right(tier, 0)
            assert tier.find([key_of(0)]) == [Presence.ABSENT]
            assert all(is_right(tier, number) for number in range(1, 5))
            assert len(list(tier.folder.glob("objects/*/*"))) == 5
            tier.quarantine(key_of(4), "for the test")
            assert not is_right(tier, 4)
        assert len(warnings) == tier.num_outages == 1
        assert "Read-only" in warnings[0]

        wait_for_put(tier, 11)
        until = monotonic() + 20
        while len(list(tier.folder.glob("objects/*/*"))) > 4:
            assert monotonic() < until, "what was deleted is still there"
            sleep(0.05)

        assert_equal_to_files(tier)
        assert [is_right(tier, number) for number in range(5)] == [False, True, True, True, False]


def test_a_start_on_a_read_only_disk(tmp_path: Path, warnings: list[str]) -> None:
    """A cache that nobody may write to can be read."""
    with DiskTier(tmp_path / "cache", 1 << 30) as tier:
        for number in range(5):
            store_object(tier, key_of(number), NUM_BYTES)
            tier.relabel(key_of(number), b"tag")

    with read_only(tier.folder), DiskTier(tier.folder, 1 << 30, retry_s=RETRY_S) as tier:
        assert is_right(tier, 3)
        assert tier.wait_until_verified(20)
        assert tier.find([key_of(number) for number in range(5)]) == [Presence.PRESENT] * 5
        assert tier.labels(key_of(2)) == b"tag"
        assert store_object(tier, key_of(10), NUM_BYTES) is PutOutcome.FAILED
    assert len(warnings) == 1


@pytest.mark.parametrize("what", ["cache", "cache/objects", "cache/partial"])
def test_folders_that_are_removed(tmp_path: Path, warnings: list[str], what: str) -> None:
    """Objects whose files are gone are forgotten; folders are made again."""
    with DiskTier(tmp_path / "cache", 1 << 30, retry_s=RETRY_S) as tier:
        assert tier.wait_until_verified(20)
        for number in range(5):
            store_object(tier, key_of(number), NUM_BYTES)
        shutil.rmtree(tmp_path / what)

        is_left = what == "cache/partial"
        assert is_right(tier, 0) == is_left
        wait_for_put(tier, 10)
        report = tier.verify()

        assert report.num_files == (6 if is_left else 1)
        assert is_right(tier, 10)
        assert_equal_to_files(tier)
        assert len(warnings) <= 1
    with DiskTier(tmp_path / "cache", 1 << 30) as tier:
        assert tier.wait_until_verified(20)
        assert is_right(tier, 10)
        assert_equal_to_files(tier)


def test_a_disk_that_cannot_be_read(tmp_path: Path, warnings: list[str]) -> None:
    """Reads fail once, then are not tried for a while; when the disk works again all is there."""
    with (
        failing_disk(tmp_path) as disk,
        DiskTier(disk.path / "cache", 1 << 30, retry_s=RETRY_S) as tier,
    ):
        for number in range(5):
            store_object(tier, key_of(number), NUM_BYTES)
        disk.fail(*tier.folder.glob("objects/*/*"))

        found = read_object(tier, key_of(1), NUM_BYTES)
        assert isinstance(found, Miss)
        assert found.cause is MissCause.UNAVAILABLE
        assert "Input/output" in found.reason
        assert tier.find([key_of(1), key_of(2)]) == [Presence.ABSENT] * 2
        assert not is_right(tier, 2)
        sleep(RETRY_S)
        assert not is_right(tier, 3)
        assert len(warnings) == tier.num_outages == 1
        assert tier.stats().misses == {MissCause.UNAVAILABLE: 3}

        disk.mend()
        sleep(RETRY_S)
        # Those that failed are put aside, since one bad place would fail for ever.
        assert [is_right(tier, number) for number in range(5)] == [True, False, True, False, True]
        assert len(warnings) == 1


def test_a_clock_that_is_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are the last ones, whatever the clock said when they were written."""
    with DiskTier(tmp_path / "cache", 1 << 30) as tier:
        store_object(tier, key_of(1), NUM_BYTES)
        tier.relabel(key_of(1), b"a")
        tier._shelf.sync()
        with monkeypatch.context() as patch:
            patch.setattr("kvkeep.tiers.disk_files.time_ns", lambda: 1_000_000_000)
            patch.setattr("kvkeep.tiers.disk_journal.time_ns", lambda: 1_000_000_000)
            tier.relabel(key_of(1), b"b")
            store_object(tier, key_of(2), NUM_BYTES)
            # As after kill -9: the index has not heard of it.
            tier._shelf.journal._rows.clear()
    with DiskTier(tmp_path / "cache", 1 << 30) as tier:
        assert tier.labels(key_of(1)) == b"b"
        assert tier.wait_until_verified(20)
        assert tier.labels(key_of(1)) == b"b"
        assert is_right(tier, 2)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    """The error names the field, and nothing is written."""
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="folder="):
        DiskTier(tmp_path / "file", 1 << 20)
    with pytest.raises(ConfigError, match="capacity_bytes=100"):
        DiskTier(tmp_path / "cache", 100)
    with pytest.raises(ConfigError, match="policy='newest'"):
        DiskTier(tmp_path / "cache", 1 << 20, policy="newest")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_scan_of_a_failing_disk_is_an_error_of_the_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it is told; nobody else is."""
    with DiskTier(tmp_path / "cache", 1 << 30) as tier:
        store_object(tier, key_of(1), NUM_BYTES)

        def failing(path: str) -> None:
            raise OSError(5, "Input/output error", path)

        monkeypatch.setattr("kvkeep.tiers.disk_files.read_form", failing)
        with pytest.raises(TierError, match="cannot be verified"):
            tier.verify()
