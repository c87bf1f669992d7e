"""Files of objects: their form, and how they are written, read, copied and removed."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, cut, key_of
from kvkeep.tiers.disk_files import ObjectFiles
from kvkeep.tiers.disk_form import (
    FileForm,
    file_bytes,
    key_of_name,
    name_of_key,
    read_form,
    taken_bytes,
)
from kvkeep.tiers.trailer import encode_tail

KEY = key_of(1)


@pytest.fixture
def files(tmp_path: Path) -> ObjectFiles:
    """An empty folder."""
    files = ObjectFiles(str(tmp_path / "cache"), is_durable=False)
    files.make_folders()
    return files


def temporary(files: ObjectFiles) -> str:
    """Where a file is before it has its name."""
    return str(Path(files.path(KEY)).parents[2] / "new")


def write(files: ObjectFiles, key: StoredKey, num_bytes: int, labels: bytes = b"") -> int:
    """Make the object's file; its stamp."""
    path = temporary(files)
    stamp = files.write(path, [memoryview(content_of(key, num_bytes))], num_bytes, b"")
    assert stamp is not None
    files.rename(path, key)
    if labels:
        stamp = files.copy(key, path, num_bytes, labels)
        assert stamp is not None
        files.rename(path, key)
    return stamp


def test_the_bytes_of_a_file() -> None:
    """The trailer is what the docstring says, so that other programs can read it."""
    trailer = encode_tail(5, b"ab")

    assert trailer[:2] == b"ab"
    assert trailer[2:10] == (5).to_bytes(8, "little")
    assert trailer[10:14] == (2).to_bytes(4, "little")
    assert trailer[18:] == b"KVKEEPL1"
    assert file_bytes(5, 2) == 5 + len(trailer) == 31
    assert [taken_bytes(size, 0) for size in (0, 4072, 4073)] == [4096, 4096, 8192]


def test_names_are_keys() -> None:
    """Each key has one name; other names are of something else."""
    assert key_of_name(name_of_key(KEY)) == KEY
    for name in ("", "abc", "xyz", "AB", "ab cd", "ab "):
        assert key_of_name(name) is None


@pytest.mark.parametrize("labels", [b"", b"tag", bytes(9000)])
def test_a_file_says_what_it_is(files: ObjectFiles, labels: bytes) -> None:
    """Its object's length, its labels, and a stamp that is its time of modification."""
    stamp = write(files, KEY, 7001, labels)

    assert files.form(KEY) == FileForm(7001, labels, stamp)
    assert Path(files.path(KEY)).stat().st_size == file_bytes(7001, len(labels))
    buffer = bytearray(7001)
    assert files.read(KEY, cut(buffer, [5, 5, 4000]), 7001) == labels
    assert bytes(buffer) == content_of(KEY, 7001)


def test_a_file_that_is_not_whole_says_nothing(files: ObjectFiles) -> None:
    """Every cut, and every flipped byte behind the object, is seen."""
    write(files, KEY, 100, b"tag")
    path = files.path(KEY)
    content = Path(path).read_bytes()

    for length in range(len(content)):
        Path(path).write_bytes(content[:length])
        assert read_form(path) is None
    for at in range(100, len(content)):
        Path(path).write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert read_form(path) is None
    Path(path).write_bytes(content[:-24] + b"\xff" * 16 + content[-8:])
    assert read_form(path) is None


def test_reading_stops_at_the_end_of_a_file(files: ObjectFiles) -> None:
    """A file that ends early fills no buffers; one that is not there raises."""
    write(files, KEY, 5000)
    os.truncate(files.path(KEY), 3000)

    assert files.read(KEY, [memoryview(bytearray(5000))], 5000) is None
    assert files.read(KEY, cut(bytearray(5000), range(5000)), 5000) is None
    with pytest.raises(FileNotFoundError):
        files.read(key_of(2), [memoryview(bytearray(10))], 10)


def test_writes_and_reads_that_the_system_cuts_short(
    files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few bytes a call moves, all of them arrive, in order."""
    writev, preadv = os.writev, os.preadv

    def short_writev(fd: int, parts: list[memoryview]) -> int:
        return os.write(fd, parts[0][:777]) if parts[0].nbytes > 777 else writev(fd, parts[:1])

    def short_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0].cast("B")[:555]], offset)

    monkeypatch.setattr(os, "writev", short_writev)
    monkeypatch.setattr(os, "preadv", short_preadv)
    write(files, KEY, 10_000)
    buffer = bytearray(10_000)

    assert files.read(KEY, cut(buffer, [100, 100, 4000]), 10_000) is not None
    assert bytes(buffer) == content_of(KEY, 10_000)
    assert files.form(KEY) is not None


def test_a_source_may_use_its_memory_again(files: ObjectFiles) -> None:
    """Parts that are made one by one are written before the next one is asked for."""
    memory = bytearray(1000)

    def parts() -> Iterator[memoryview]:
        for number in range(5):
            memory[:] = bytes([number]) * 1000
            yield memoryview(memory)

    assert files.write(temporary(files), parts(), 5000, b"") is not None
    content = Path(temporary(files)).read_bytes()
    assert content[:5000] == b"".join(bytes([number]) * 1000 for number in range(5))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EINVAL])
def test_a_file_is_copied_where_the_system_cannot(
    files: ObjectFiles, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Through memory then; a source that is cut off is no copy, and other errors are passed on."""

    def failing(source: int, target: int, num_bytes: int) -> int:
        raise OSError(number, "no such call")

    monkeypatch.setattr(os, "copy_file_range", failing)
    write(files, KEY, 3_000_000, b"tag")
    form = files.form(KEY)
    buffer = bytearray(3_000_000)

    assert form is not None
    assert form.labels == b"tag"
    assert files.read(KEY, [memoryview(buffer)], 3_000_000) is not None
    assert bytes(buffer) == content_of(KEY, 3_000_000)
    os.truncate(files.path(KEY), 2_000_000)
    assert files.copy(KEY, temporary(files), 3_000_000, b"") is None
    number = errno.EIO
    with pytest.raises(OSError, match="no such call"):
        files.copy(KEY, temporary(files), 3_000_000, b"")


@pytest.mark.parametrize("num_bytes", [4096, 8000, 12_200])
def test_labels_that_fit_are_written_into_the_file(files: ObjectFiles, num_bytes: int) -> None:
    """Shorter and longer ones, while the file stays in its block; each is what the file says afterwards."""
    write(files, KEY, num_bytes, b"first")
    before = Path(files.path(KEY)).stat()

    for labels in (b"other", b"", b"longer" * 5, b"x"):
        stamp = files.relabel(KEY, num_bytes, labels)
        assert stamp is not None
        assert files.form(KEY) == FileForm(num_bytes, labels, stamp)
        buffer = bytearray(num_bytes)
        assert files.read(KEY, [memoryview(buffer)], num_bytes) == labels
        assert bytes(buffer) == content_of(KEY, num_bytes)

    after = Path(files.path(KEY)).stat()
    assert after.st_ino == before.st_ino
    assert after.st_size == file_bytes(num_bytes, len(b"longer" * 5))


def test_labels_that_do_not_fit_take_a_copy(files: ObjectFiles) -> None:
    """One write must not cross the end of a block, and a file that is not whole has no place for any."""
    write(files, KEY, 4000, b"first")
    content = Path(files.path(KEY)).read_bytes()

    assert files.relabel(KEY, 4000, bytes(73)) is None
    assert Path(files.path(KEY)).read_bytes() == content
    assert files.relabel(KEY, 4000, bytes(72)) is not None
    os.truncate(files.path(KEY), 4010)
    assert files.relabel(KEY, 4000, b"tag") is None
    with pytest.raises(FileNotFoundError):
        files.relabel(key_of(2), 10, b"")


def test_labels_are_not_written_beside_another_process(files: ObjectFiles) -> None:
    """Who holds the file's lock is about to write there."""
    write(files, KEY, 5000)

    with Path(files.path(KEY)).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert files.relabel(KEY, 5000, b"tag") is None
    assert files.relabel(KEY, 5000, b"tag") is not None


def test_who_reads_half_written_labels_reads_again(
    files: ObjectFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not whole now may be so a moment later; what stays so is not whole."""
    write(files, KEY, 5000, b"first")
    path, buffer = Path(files.path(KEY)), bytearray(5000)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"first", b"fiNEW"))
    pauses: list[float] = []

    def heal(pause_s: float) -> None:
        pauses.append(pause_s)
        path.write_bytes(whole)

    monkeypatch.setattr("kvkeep.tiers.disk_form.sleep", heal)

    assert files.read(KEY, [memoryview(buffer)], 5000) == b"first"
    assert len(pauses) == 1


def test_stamps_are_all_different(files: ObjectFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the clock stands still, or goes back."""
    times = iter([5_000, 5_000, 4_000, 9_000])
    monkeypatch.setattr("kvkeep.tiers.disk_files.time_ns", lambda: next(times))

    stamps = [write(files, key_of(number), 10) for number in range(4)]

    assert stamps == [5_000, 5_001, 5_002, 9_000]
    forms = [files.form(key_of(number)) for number in range(4)]
    assert [form.stamp for form in forms if form is not None] == stamps


def test_a_detached_file_is_read_to_its_end(files: ObjectFiles) -> None:
    """Who has it open has it whole; its name is free."""
    write(files, KEY, 5000)
    with Path(files.path(KEY)).open("rb") as reader:
        detached = files.detach(KEY)
        assert detached is not None
        os.close(detached.fd)
        assert detached.num_bytes == file_bytes(5000, 0)
        assert reader.read(5000) == content_of(KEY, 5000)
    assert files.detach(KEY) is None
    assert not files.exists(KEY)


def test_folders_and_files_are_for_their_owner(files: ObjectFiles, tmp_path: Path) -> None:
    """Prompts can be read out of K/V, so that nobody else may read them."""
    write(files, KEY, 10)

    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "cache").rglob("*")}

    assert modes == {0}
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is synced when it is written, its folder when it is renamed; without `durable`, neither."""
    synced: list[str] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    for is_durable in (False, True):
        files = ObjectFiles(str(tmp_path / f"cache-{is_durable}"), is_durable=is_durable)
        files.make_folders()
        write(files, KEY, 10)
        files.settle(KEY)

    path = files.path(KEY)
    assert synced == [temporary(files), str(Path(path).parent)]
