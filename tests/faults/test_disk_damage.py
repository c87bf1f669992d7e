"""Files and indexes that are cut, flipped, swapped or lost: never wrong bytes, and the books heal."""

import os
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.reading import Verified, read_block, stored_parts
from kvkeep.tiers.stored_form import HEADER_PAGE, StoredHeader, checksum, encode_header
from kvkeep.tiers.trailer import encode_tail

BLOCK_SIZE = 32
PAYLOAD_BYTES = 20_480
OBJECT_BYTES = HEADER_PAGE + PAYLOAD_BYTES
LABELS = b"session 7, doc 77"
TRAILER_BYTES = len(encode_tail(OBJECT_BYTES, b""))


def header_of(number: int) -> StoredHeader:
    """What block `number` must say of itself."""
    key = key_of(number)
    return StoredHeader(
        key=key[:-1],
        parent=key_of(number + 1000)[:-1],
        namespace=b"n" * 32,
        tokens=content_of(key, 4 * BLOCK_SIZE),
        group=0,
        group_name="full",
        kv_format="bfloat16",
        layout="words/1",
        payload_bytes=PAYLOAD_BYTES,
        checksum=checksum([memoryview(content_of(key, PAYLOAD_BYTES))]),
    )


def put_block(tier: DiskTier, number: int) -> None:
    """Store a block in its stored form, with labels."""
    payload = memoryview(content_of(key_of(number), PAYLOAD_BYTES))
    parts = stored_parts(header_of(number), BLOCK_SIZE, payload)
    assert tier.put(key_of(number), parts(), OBJECT_BYTES) is PutOutcome.STORED
    assert tier.relabel(key_of(number), LABELS)


def read(tier: DiskTier, number: int) -> Verified | Miss:
    """Read a block as the cache does; what is verified must have the right bytes."""
    payload = bytearray(PAYLOAD_BYTES)
    wanted = replace_checksum(header_of(number))
    found = read_block(tier, key_of(number), wanted, BLOCK_SIZE, memoryview(payload))
    if isinstance(found, Verified):
        assert bytes(payload) == content_of(key_of(number), PAYLOAD_BYTES)
    return found


def replace_checksum(header: StoredHeader) -> StoredHeader:
    """A header as who looks for the block knows it: the checksum is the store's to tell."""
    return StoredHeader(**{**{name: getattr(header, name) for name in header.__struct_fields__},
                           "checksum": b""})  # fmt: skip


def file_of(tier: DiskTier, key: StoredKey) -> Path:
    """Where the object lies."""
    return tier.folder / "objects" / key.hex()[:2] / key.hex()


def assert_put_aside(tier: DiskTier, number: int) -> None:
    """Nobody finds the object, its file lies in quarantine, and a new one can be put."""
    assert tier.find([key_of(number)]) == [Presence.ABSENT]
    assert not file_of(tier, key_of(number)).exists()
    kept = [path.name.split("-")[1] for path in (tier.folder / "quarantine").iterdir()]
    assert kept == [key_of(number).hex()]
    assert tier.num_quarantined == 1
    put_block(tier, number)
    assert isinstance(read(tier, number), Verified)


_REGIONS = {
    "magic": (0, 8), "lengths": (8, 16), "header checksum": (16, 24), "map": (24, 380),
    "padding": (1500, HEADER_PAGE), "payload": (HEADER_PAGE, OBJECT_BYTES),
}  # fmt: skip


@pytest.mark.parametrize("region", _REGIONS)
def test_a_flipped_bit_is_found_out(tmp_path: Path, region: str) -> None:
    """Wherever in an object a bit flips: it is a miss with a reason, and put aside."""
    chooser = random.Random(region)
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        for number in range(12):
            put_block(tier, number)
            assert isinstance(read(tier, number), Verified)
            offset = chooser.randrange(*_REGIONS[region])
            _flip(file_of(tier, key_of(number)), offset, chooser.randrange(8))

            found = read(tier, number)

            assert isinstance(found, Miss), (offset, region)
            assert found.cause is MissCause.CORRUPT
            assert tier.find([key_of(number)]) == [Presence.ABSENT]
            assert tier.num_quarantined == number + 1
        put_block(tier, 0)
        assert isinstance(read(tier, 0), Verified)


@pytest.mark.parametrize("is_index_lost", [False, True])
def test_a_flipped_bit_in_labels_is_found_out_when_they_are_read(
    tmp_path: Path, is_index_lost: bool
) -> None:
    """Labels decide what is purged: what has wrong ones is neither kept nor got, with or without an index."""
    num_tail, chooser = len(LABELS) + TRAILER_BYTES, random.Random(1)
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        for number in range(num_tail):
            put_block(tier, number)
    for number in range(num_tail):
        _flip(file_of(tier, key_of(number)), OBJECT_BYTES + number, chooser.randrange(8))
    if is_index_lost:
        (tmp_path / "cache" / "index.sqlite").unlink()

    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        if not is_index_lost:
            # The object's own bytes are right, and nobody can tell whether it may still be used.
            found = read(tier, 0)
            assert isinstance(found, Miss)
            assert found.cause is MissCause.CORRUPT
        assert tier.wait_until_verified(30)
        report = tier.verify()

        assert list(tier.objects()) == []
        assert tier.num_quarantined == num_tail
        assert report.is_clean
        assert len(list((tier.folder / "quarantine").iterdir())) == 16


_LENGTHS = (
    0, 1, 23, 24, 300, HEADER_PAGE - 1, HEADER_PAGE, HEADER_PAGE + 1, OBJECT_BYTES - 1,
)  # fmt: skip


@pytest.mark.parametrize("length", _LENGTHS)
def test_a_file_that_is_cut_off_in_the_object(tmp_path: Path, length: int) -> None:
    """It is a miss, and put aside."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        put_block(tier, 1)
        os.truncate(file_of(tier, key_of(1)), length)

        found = read(tier, 1)

        assert isinstance(found, Miss)
        assert found.cause is MissCause.CORRUPT
        assert_put_aside(tier, 1)


@pytest.mark.parametrize("is_index_lost", [False, True])
@pytest.mark.parametrize(
    "length", [*_LENGTHS, OBJECT_BYTES, OBJECT_BYTES + 5, OBJECT_BYTES + len(LABELS) + 23, 30_000]
)
def test_a_file_of_a_wrong_length_is_found_out_at_the_start(
    tmp_path: Path, length: int, is_index_lost: bool
) -> None:
    """Shorter or longer: the scan asks the file, which cannot say what it is, and puts it aside."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        put_block(tier, 1)
        put_block(tier, 2)
    os.truncate(file_of(tier, key_of(1)), length)
    if is_index_lost:
        (tmp_path / "cache" / "index.sqlite").unlink()

    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        assert tier.wait_until_verified(30)

        assert isinstance(read(tier, 2), Verified)
        assert tier.labels(key_of(2)) == LABELS
        assert tier.used_bytes == tier._shelf.ledger.total_bytes == 28_672
        assert_put_aside(tier, 1)


def test_files_that_were_swapped(tmp_path: Path) -> None:
    """Whole objects under each other's names are the content of another key."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        put_block(tier, 1)
        put_block(tier, 2)
        first, second = file_of(tier, key_of(1)), file_of(tier, key_of(2))
        first.rename(tmp_path / "x")
        second.rename(first)
        (tmp_path / "x").rename(second)

        found = [read(tier, 1), read(tier, 2)]

        assert [miss.cause for miss in found if isinstance(miss, Miss)] == [MissCause.MISMATCH] * 2
        assert tier.find([key_of(1), key_of(2)]) == [Presence.ABSENT] * 2
        assert tier.num_quarantined == 2


def test_a_file_that_was_replaced(tmp_path: Path) -> None:
    """Another object of another length, with a form of its own, is what the file says, and is no match."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        put_block(tier, 1)
        store_object(tier, key_of(2), 5000)
        file_of(tier, key_of(1)).write_bytes(file_of(tier, key_of(2)).read_bytes())

        assert isinstance(read(tier, 1), Miss)
        assert tier.verify().is_clean
        assert read_object(tier, key_of(2), 5000) == content_of(key_of(2), 5000)


def test_quarantine_is_bounded_in_bytes(tmp_path: Path) -> None:
    """It takes a sixteenth of the capacity; an object that is larger is removed."""
    with DiskTier(tmp_path / "cache", 320_000) as tier:
        for number, num_bytes in enumerate((9_000, 9_000, 9_000, 100_000)):
            store_object(tier, key_of(number), num_bytes)
            tier.quarantine(key_of(number), "for the test")
            kept = list((tier.folder / "quarantine").iterdir())
            assert sum(path.stat().st_size for path in kept) <= 20_000
            assert len(kept) == (1, 2, 2, 0)[number]
        tier.quarantine(key_of(99), "is not there")
        assert tier.num_quarantined == 4
        assert tier.used_bytes == tier._shelf.ledger.total_bytes == 0


def _lost(path: Path) -> None:
    path.unlink()


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("this is no database " * 500)


def _head_flipped(path: Path) -> None:
    for offset in range(0, 100, 7):
        _flip(path, offset, 3)


def _pages_overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = random.Random(1).randbytes(len(content) - 4096)
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def _other_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def _other_tables(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE objects (name TEXT)")
    connection.execute("PRAGMA user_version = 1")
    connection.close()


def _rows_changed(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE objects SET labels = cast(upper(cast(labels AS TEXT)) AS BLOB)")
    connection.execute("UPDATE objects SET num_bytes = -5 WHERE num_bytes % 3 = 0")
    connection.execute("UPDATE objects SET key = 'text' WHERE num_bytes = 3001")
    connection.commit()
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [_lost, _emptied, _text, _head_flipped, _pages_overwritten, _cut, _other_version,
     _other_tables, _rows_changed],
)  # fmt: skip
def test_an_index_that_is_lost_or_damaged(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """Objects are got at once all the same, and found, with their labels, as soon as files were read."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        for number in range(300):
            store_object(tier, key_of(number), 3000 + number)
            if number % 10 == 0:
                tier.relabel(key_of(number), b"label %d" % number)
        used = tier.used_bytes
    damage(tmp_path / "cache" / "index.sqlite")

    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        assert tier.labels(key_of(10)) == b"label 10"
        assert read_object(tier, key_of(7), 3007) == content_of(key_of(7), 3007)
        assert tier.wait_until_verified(30)
        for number in range(300):
            key = key_of(number)
            assert read_object(tier, key, 3000 + number) == content_of(key, 3000 + number)
            assert tier.labels(key) == (b"label %d" % number if number % 10 == 0 else b"")
        assert len(list(tier.objects())) == 300
        assert tier.used_bytes == tier._shelf.ledger.total_bytes == used
        assert tier.num_quarantined == 0
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        assert len(list(tier.objects())) == 300
        assert tier.verify().is_clean


def test_an_index_that_is_removed_while_it_is_used(tmp_path: Path) -> None:
    """It is made anew from what is known."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        for number in range(20):
            store_object(tier, key_of(number), 3000)
        tier._shelf.sync()
        for path in tier.folder.glob("index.sqlite*"):
            path.unlink()
        store_object(tier, key_of(20), 3000)

    connection = sqlite3.connect(tmp_path / "cache" / "index.sqlite")
    keys = {key for (key,) in connection.execute("SELECT key FROM objects")}
    connection.close()
    assert keys == {key_of(number) for number in range(21)}


@pytest.mark.parametrize("content", [b"", b"KVKEEPU1", b"x" * 100, b"KVKEEPU1" + b"\xff" * 9])
def test_a_ledger_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    """Who starts alone counts anew."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        store_object(tier, key_of(1), 5000)
    (tmp_path / "cache" / "ledger").write_bytes(content)

    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        assert tier._shelf.ledger.total_bytes == 8192
        assert store_object(tier, key_of(2), 3000) is PutOutcome.STORED
        assert tier._shelf.ledger.total_bytes == 12_288


def test_files_that_are_no_objects_are_left_alone(tmp_path: Path) -> None:
    """What somebody else left among them is counted, and not touched."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        store_object(tier, key_of(1), 5000)
        (tier.folder / "objects" / "00").mkdir()
        (tier.folder / "objects" / "00" / "notes.txt").write_text("mine")
        misplaced = tier.folder / "objects" / "00" / ("ff" * 33)
        misplaced.write_bytes(bytes(100))

        report = tier.verify()

        assert (report.num_files, report.num_strange) == (3, 2)
        assert report.is_clean
        assert misplaced.exists()


def test_objects_that_no_longer_fit_go_at_the_start(tmp_path: Path) -> None:
    """With less capacity than last time the longest unused go, files included."""
    with DiskTier(tmp_path / "cache", 1 << 24) as tier:
        for number in range(20):
            store_object(tier, key_of(number), 8000)
        read_object(tier, key_of(0), 8000)

    with DiskTier(tmp_path / "cache", 5 * 8192) as tier:
        kept = {item.key for item in tier.objects()}
        assert kept == {key_of(number) for number in (0, 16, 17, 18, 19)}
        assert {path.name for path in tier.folder.glob("objects/*/*")} == {
            key.hex() for key in kept
        }
        assert tier.used_bytes == tier._shelf.ledger.total_bytes == 5 * 8192


def _flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_headers_are_encoded_as_the_test_thinks() -> None:
    """The regions that are flipped above are where the stored form has them."""
    page = encode_header(header_of(1), BLOCK_SIZE)
    length = int.from_bytes(page[8:12], "little")

    assert len(page) == HEADER_PAGE
    assert 380 < 24 + length < 1500
