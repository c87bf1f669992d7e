"""The index of a folder, and the journal that leads to it."""

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvkeep.testing.tier_contents import key_of
from kvkeep.tiers.disk_index import Batch, Changes, DiskIndex, Row, is_damage
from kvkeep.tiers.disk_journal import Journal


def row_of(number: int, labels: bytes = b"", used_at: int | None = None) -> Row:
    """A row of its own for each number."""
    return Row(
        key_of(number), 100 + number, labels, 7 * number, number if used_at is None else used_at
    )


def batch_of(*rows: Row) -> Batch:
    """A batch that writes these."""
    return Batch({row.key: row for row in rows})


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DiskIndex]:
    """An empty index."""
    with closing(DiskIndex(tmp_path / "index.sqlite")) as index:
        yield index


def test_rows_come_back_in_the_order_of_their_use(index: DiskIndex, tmp_path: Path) -> None:
    """Of a second connection too; what was used again comes last, what is gone does not come."""
    index.write(batch_of(*(row_of(number) for number in range(5))), keep_gone=False)
    used = {key_of(1): 1000, key_of(77): 2000}
    index.write(Batch({key_of(3): None, key_of(2): row_of(2, b"tag")}, used), keep_gone=False)

    with closing(DiskIndex(tmp_path / "index.sqlite")) as again:
        rows = again.rows()

    assert rows == [row_of(0), row_of(2, b"tag"), row_of(4), row_of(1, used_at=1000)]


def test_each_learns_what_the_other_changed(index: DiskIndex, tmp_path: Path) -> None:
    """Once, and of its own changes nothing."""
    with closing(DiskIndex(tmp_path / "index.sqlite")) as other:
        index.write(batch_of(row_of(1), row_of(2)), keep_gone=True)
        assert index.changes() == Changes()
        assert other.changes() == Changes((row_of(1), row_of(2)), ())
        assert other.changes() == Changes()

        index.write(Batch({key_of(1): None}), keep_gone=True)
        assert other.write(batch_of(row_of(3)), keep_gone=True) == Changes((), (key_of(1),))
        assert other.changes() == Changes()
        assert index.changes() == Changes((row_of(3),), ())
        assert index.rows() == [row_of(2), row_of(3)]


def test_word_of_what_is_gone_is_kept_for_others_only(index: DiskIndex, tmp_path: Path) -> None:
    """Without others it is removed, and with them after a while."""
    index.write(batch_of(row_of(1), row_of(2)), keep_gone=True)

    def num_rows() -> int:
        with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
            return int(connection.execute("SELECT count(*) FROM objects").fetchone()[0])

    index.write(Batch({key_of(1): None}), keep_gone=True)
    assert num_rows() == 2
    index.write(batch_of(row_of(3)), keep_gone=False)
    assert num_rows() == 2
    index.write(Batch({key_of(2): None}), keep_gone=True)
    with closing(sqlite3.connect(tmp_path / "index.sqlite")) as connection:
        connection.execute("UPDATE objects SET used_at = used_at - 400000000000 WHERE is_gone")
        connection.commit()
    index.write(batch_of(row_of(4)), keep_gone=True)
    assert num_rows() == 2


def test_a_batch_is_written_whole_or_not_at_all(index: DiskIndex) -> None:
    """When a row cannot be written, none is, and the next batch can be."""
    wrong = Row(key_of(2), 2**63 + 5, b"", 0, 0)

    with pytest.raises(OverflowError):
        index.write(batch_of(row_of(1), wrong), keep_gone=False)
    assert index.rows() == []
    index.write(batch_of(row_of(3)), keep_gone=False)
    assert index.rows() == [row_of(3)]


def test_damage_is_told_from_other_errors(tmp_path: Path) -> None:
    """A file that is no index is damage; one that cannot be opened is not."""
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(sqlite3.Error) as damaged:
        DiskIndex(tmp_path / "text")
    with pytest.raises(sqlite3.Error) as missing:
        DiskIndex(tmp_path / "nowhere" / "index.sqlite")

    assert is_damage(damaged.value)
    assert not is_damage(missing.value)


def test_a_journal_keeps_what_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody else holds the index nothing is lost; the newest word on each object wins."""
    caplog.set_level(logging.INFO, "kvkeep")
    monkeypatch.setattr("kvkeep.tiers.disk_index._BUSY_S", 0.01)
    monkeypatch.setattr("kvkeep.tiers.disk_journal._RETRY_S", 0.0)
    journal = Journal(str(tmp_path), list)
    assert journal.open() == []
    journal.note(row_of(5))
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            journal.note(row_of(1))
            journal.note(row_of(2))
            journal.note_used([key_of(1)])
            assert journal.sync(keep_gone=False) == Changes()
            journal.note_gone(key_of(1))
            journal.note(row_of(2, b"newer"))
        holder.execute("ROLLBACK")

    journal.sync(keep_gone=False)
    journal.close()

    with closing(DiskIndex(tmp_path / "index.sqlite")) as index:
        assert index.rows() == [row_of(2, b"newer"), row_of(5)]
    messages = [record.getMessage() for record in caplog.records]
    assert [("locked" in message, "works again" in message) for message in messages] == [
        (True, False),
        (False, True),
    ]


def test_what_is_noted_while_a_batch_fails_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that comes back goes under what was noted since."""
    monkeypatch.setattr("kvkeep.tiers.disk_journal._RETRY_S", 0.0)
    journal = Journal(str(tmp_path), list)
    journal.open()
    journal.note(row_of(1))
    journal.note(row_of(2))

    def fail(index: DiskIndex, batch: Batch, *, keep_gone: bool) -> Changes:
        journal.note(row_of(2, b"newer"))
        journal.note_gone(key_of(1))
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(DiskIndex, "write", fail)
        journal.sync(keep_gone=False)
    journal.sync(keep_gone=False)
    journal.close()

    with closing(DiskIndex(tmp_path / "index.sqlite")) as index:
        assert index.rows() == [row_of(2, b"newer")]


def test_a_journal_without_index_does_not_grow_without_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too much to remember is let go, and the index made anew from all there is."""
    monkeypatch.setattr("kvkeep.tiers.disk_journal._RETRY_S", 0.0)
    monkeypatch.setattr("kvkeep.tiers.disk_journal._MOST_NOTED", 50)
    journal = Journal(str(tmp_path), lambda: [row_of(1), row_of(60)])
    journal.open()
    journal.note(row_of(200))
    journal.sync(keep_gone=False)
    for number in range(60):
        journal.note(row_of(number))
        journal.note_gone(key_of(number + 100))
        assert len(journal._rows) <= 51

    journal.sync(keep_gone=False)
    journal.close()

    with closing(DiskIndex(tmp_path / "index.sqlite")) as index:
        keys = {row.key for row in index.rows()}
    assert keys >= {key_of(1), key_of(60)}
    assert key_of(200) not in keys


def test_a_journal_of_a_lost_index_writes_all_there_is(tmp_path: Path) -> None:
    """A new file gets every row, with what was noted since on top."""
    rows = [row_of(1), row_of(2)]
    journal = Journal(str(tmp_path), lambda: rows)
    journal.open()
    for path in tmp_path.iterdir():
        path.unlink()
    journal.note(row_of(2, b"newer"))
    journal.note_gone(key_of(1))
    journal.note(row_of(3))

    journal.sync(keep_gone=False)
    journal.close()

    with closing(DiskIndex(tmp_path / "index.sqlite")) as index:
        assert index.rows() == [row_of(2, b"newer"), row_of(3)]
