"""What is known of a folder of objects: the mirror in memory, everybody's bytes, the way to the index."""

from collections.abc import Iterator
from time import time_ns

from kvkeep.policies import EvictionPolicy
from kvkeep.spec import StoredKey
from kvkeep.tiers.catalog import Catalog
from kvkeep.tiers.disk_form import FileForm, taken_bytes, whole_blocks
from kvkeep.tiers.disk_index import Row
from kvkeep.tiers.disk_journal import Journal
from kvkeep.tiers.disk_ledger import FolderLedger

__all__ = ["Books"]


class Books:
    """Three books that a shelf keeps equal. Thread-safe."""

    def __init__(self, folder: str, capacity_bytes: int, policy: EvictionPolicy[StoredKey]) -> None:
        self.catalog = Catalog(capacity_bytes, policy, taken=taken_bytes)
        self.ledger = FolderLedger(folder)
        self.journal = Journal(folder, self._rows)

    @property
    def num_others(self) -> int:
        """How many other processes there are; at least one where nobody can tell."""
        try:
            return self.ledger.num_others
        except OSError:
            return 1

    def known_bytes(self, key: StoredKey) -> int:
        """What a complete object takes, as far as the mirror knows; 0 without one."""
        form = self.known_form(key)
        return 0 if form is None else taken_bytes(form.num_bytes, len(form.labels))

    def known_form(self, key: StoredKey) -> FileForm | None:
        """What the file of a complete object should say of itself; its stamp is not known here."""
        num_bytes, labels = self.catalog.num_bytes(key), self.catalog.labels(key)
        return None if num_bytes is None or labels is None else FileForm(num_bytes, labels, 0)

    def counted_bytes(self, known_bytes: int, length: int) -> int:
        """What the ledger counts for a file: what is known, or what another process counted."""
        return known_bytes or (whole_blocks(length) if self.num_others else 0)

    def count_if_alone(self, num_bytes: int) -> None:
        """Correct the ledger; other processes, if there are any, count what they do themselves."""
        if num_bytes and not self.num_others:
            self.ledger.add(num_bytes)

    def correct(self, key: StoredKey, num_bytes: int, labels: bytes) -> bool:
        """Let the mirror know other labels of an object, which who reads or holds it goes on doing.

        False, and no change, where it does not know one of this length, or has no room for them.
        """
        known = self.known_form(key)
        if known is None or known.num_bytes != num_bytes:
            return False
        return known.labels == labels or self.catalog.relabel(key, labels)

    def note(self, key: StoredKey, form: FileForm) -> None:
        """Enter a file in the index, as used when it was written."""
        self.journal.note(Row(key, form.num_bytes, form.labels, form.stamp, form.stamp))

    def _rows(self) -> Iterator[Row]:
        """All that is known, for a new index; no stamp fits, so that the next scan looks at each file."""
        for item in self.catalog.objects():
            form = self.known_form(item.key)
            if form is not None:
                yield Row(item.key, form.num_bytes, form.labels, form.stamp, time_ns())
