"""The bytes that several processes have taken of one folder together."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.tiers.disk_ledger import FolderLedger


class Crew:
    """Ledgers of one folder, as several processes have them; `die` ends one as kill -9 does."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._ledgers: list[FolderLedger] = []

    def enter(self, *, alone: bool) -> FolderLedger:
        """Another process comes."""
        ledger = FolderLedger(self._folder)
        self._ledgers.append(ledger)
        assert ledger.open() is alone
        return ledger

    def die(self, ledger: FolderLedger) -> None:
        """The system closes the files of a process that is killed, and does nothing else."""
        ledger._close_files()

    def close(self) -> None:
        """End all."""
        for ledger in self._ledgers:
            ledger.close()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    """Nobody is there."""
    crew = Crew(tmp_path)
    yield crew
    crew.close()


def test_all_count_together(crew: Crew) -> None:
    """What one takes is missing for the other, in flight or landed."""
    first = crew.enter(alone=True)
    first.count_all(100)
    second = crew.enter(alone=False)

    assert first.reserve(50, 200) == 0
    assert second.reserve(51, 200) == 1
    assert second.reserve(61, 200, freed_bytes=10) == 1
    second.add(10)
    assert second.reserve(50, 200) == 0
    assert first.total_bytes == second.total_bytes == 200
    assert first.land(50, lambda: "landed") == "landed"
    second.give_up(50)
    second.add(-100)
    assert first.total_bytes == second.total_bytes == 50
    assert (first.num_others, second.num_others) == (1, 1)

    first.close()
    first.close()
    assert second.num_others == 0
    assert second.total_bytes == 50


def test_what_does_not_land_is_in_flight_still(crew: Crew) -> None:
    """A rename that fails counts as before, until it is given up."""
    ledger = crew.enter(alone=True)
    ledger.reserve(50, 100)

    def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        ledger.land(50, fail)

    assert ledger.total_bytes == 50
    ledger.give_up(50)
    assert ledger.total_bytes == 0
    crew.die(ledger)
    assert crew.enter(alone=True).total_bytes == 0


def test_of_the_dead_only_what_landed_counts(crew: Crew, tmp_path: Path) -> None:
    """Their unfinished files go, and the room of these; whoever lives keeps his."""
    living, dead = crew.enter(alone=True), crew.enter(alone=False)
    for ledger in (living, dead):
        ledger.reserve(30, 1000)
        Path(ledger.partial, "7").write_bytes(b"unfinished")
    dead.add(200)
    crew.die(dead)

    living.sweep()

    assert living.total_bytes == 230
    assert living.num_others == 0
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [Path(living.partial).name]
    assert Path(living.partial, "7").exists()


def test_who_comes_sweeps_too_and_takes_the_free_slot(crew: Crew, tmp_path: Path) -> None:
    """Any number of processes can come and die; the file does not grow."""
    for _ in range(20):
        ledger = crew.enter(alone=True)
        ledger.add(1)
        crew.die(ledger)
    last = crew.enter(alone=True)

    assert last.total_bytes == 20
    assert (tmp_path / "ledger").stat().st_size == 16 + 32


def test_counting_anew_leaves_others_their_part(crew: Crew) -> None:
    """The files there are have so many bytes, whoever added them."""
    first, second = crew.enter(alone=True), crew.enter(alone=False)
    first.add(1000)
    second.add(70)
    second.reserve(5, 10_000)

    first.count_all(500)

    assert first.total_bytes == 505
    second.close()
    assert first.total_bytes == 500


def test_a_folder_that_was_removed_is_not_current(crew: Crew, tmp_path: Path) -> None:
    """Nor is one that was made anew; to enter again starts from nothing, files in flight aside."""
    ledger = crew.enter(alone=True)
    ledger.add(100)
    ledger.reserve(10, 1000)
    assert ledger.is_current()
    (tmp_path / "ledger").rename(tmp_path / "elsewhere")
    assert not ledger.is_current()
    (tmp_path / "ledger").write_bytes(b"")
    assert not ledger.is_current()

    assert ledger.open()

    assert ledger.is_current()
    assert ledger.total_bytes == 10


def test_one_who_lost_the_file_is_not_taken_for_dead(crew: Crew, tmp_path: Path) -> None:
    """Its unfinished files stay until it has found out."""
    first = crew.enter(alone=True)
    Path(first.partial, "7").write_bytes(b"unfinished")
    (tmp_path / "ledger").unlink()

    second = crew.enter(alone=False)

    assert second.num_others == 1
    assert Path(first.partial, "7").exists()
    assert not first.open()
    second.sweep()
    assert second.num_others == 1


def test_a_ledger_that_is_not_open_fails(tmp_path: Path) -> None:
    """As a medium fails, so that who asks can go on without."""
    ledger = FolderLedger(str(tmp_path / "nowhere"))

    with pytest.raises(FileNotFoundError):
        ledger.open()
    with pytest.raises(OSError, match="not open"):
        ledger.reserve(1, 2)
    assert not ledger.is_current()
    ledger.close()
