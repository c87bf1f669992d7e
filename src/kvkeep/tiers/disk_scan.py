"""A folder's files against its books: what differs is put right, in the books."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Presence
from kvkeep.tiers.disk_files import FoundFile
from kvkeep.tiers.disk_form import taken_bytes, whole_blocks
from kvkeep.tiers.disk_shelf import Shelf

__all__ = ["ScanReport", "scan"]

_STEP = 100


@dataclass(slots=True)
class ScanReport:
    """What a scan found; `num_strange` files have names that are no object's, and are left alone."""

    num_files: int = 0
    num_adopted: int = 0
    num_corrected: int = 0
    num_lost: int = 0
    num_wrong: int = 0
    num_strange: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether books and files said the same, and every file was whole."""
        return not (self.num_adopted or self.num_corrected or self.num_lost or self.num_wrong)


def scan(shelf: Shelf, stamps: Mapping[StoredKey, int], report: ScanReport) -> Iterator[None]:
    """Go through all files in small steps, beside whatever else is done with them.

    A file with the blocks and the stamp that the books have is taken for what they say; all others, so all
    files where `stamps` is empty, are asked themselves. Raises OSError.
    """
    known = {item.key for item in shelf.catalog.objects()}
    orphans: list[FoundFile] = []
    for files in shelf.files.listing():
        for file in files:
            report.num_files += 1
            if file.key is None:
                report.num_strange += 1
                continue
            known.discard(file.key)
            if shelf.catalog.find([file.key]) == [Presence.ABSENT]:
                orphans.append(file)
            elif not _is_as_known(shelf, file.key, file, stamps):
                _recheck(shelf, file.key, report)
        yield
    # The oldest first, so that the newest are used last.
    orphans.sort(key=lambda file: file.stamp)
    yield from _adopt(shelf, [file.key for file in orphans if file.key is not None], report)
    yield from _forget(shelf, known, report)


def _adopt(shelf: Shelf, keys: Iterable[StoredKey], report: ScanReport) -> Iterator[None]:
    for at, key in enumerate(keys):
        if shelf.adopt(key):
            report.num_adopted += 1
        elif shelf.catalog.find([key]) == [Presence.ABSENT]:
            report.num_wrong += 1
        if at % _STEP == 0:
            yield


def _forget(shelf: Shelf, keys: Iterable[StoredKey], report: ScanReport) -> Iterator[None]:
    """Forget objects that no folder listed; most of them were removed in good order meanwhile."""
    for at, key in enumerate(keys):
        if shelf.catalog.find([key]) == [Presence.PRESENT] and not shelf.files.exists(key):
            shelf.forget(key)
            report.num_lost += 1
        if at % _STEP == 0:
            yield


def _is_as_known(
    shelf: Shelf, key: StoredKey, file: FoundFile, stamps: Mapping[StoredKey, int]
) -> bool:
    num_bytes, labels = shelf.catalog.num_bytes(key), shelf.catalog.labels(key)
    if num_bytes is None or labels is None:
        return True  # in flight, or gone by now
    return stamps.get(key) == file.stamp and (
        whole_blocks(file.num_bytes) == taken_bytes(num_bytes, len(labels))
    )


def _recheck(shelf: Shelf, key: StoredKey, report: ScanReport) -> None:
    before = (shelf.catalog.num_bytes(key), shelf.catalog.labels(key))
    form = shelf.recheck(key)
    if form is None:
        report.num_wrong += shelf.catalog.find([key]) == [Presence.ABSENT]
    elif before != (form.num_bytes, form.labels):
        report.num_corrected += 1
