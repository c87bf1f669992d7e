"""Counts that tiers with a medium of their own keep."""

from threading import Lock

from kvkeep.tiers.base import Miss, MissCause, PutOutcome, TierStats
from kvkeep.tiers.catalog import Catalog

__all__ = ["Tally"]


class Tally:
    """Misses by cause and puts by outcome since the start. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._misses: dict[str, int] = dict.fromkeys(MissCause, 0)
        self._puts: dict[str, int] = dict.fromkeys(PutOutcome, 0)

    @property
    def misses(self) -> dict[str, int]:
        """How many gets missed, by MissCause."""
        with self._lock:
            return _counted(self._misses)

    @property
    def puts(self) -> dict[str, int]:
        """How many puts there were, by PutOutcome."""
        with self._lock:
            return _counted(self._puts)

    def miss(self, cause: MissCause, reason: str = "") -> Miss:
        """Count a miss, and make it."""
        with self._lock:
            self._misses[cause] += 1
        return Miss(cause, reason)

    def put(self, outcome: PutOutcome) -> PutOutcome:
        """Count a put."""
        with self._lock:
            self._puts[outcome] += 1
        return outcome

    def stats(self, name: str, catalog: Catalog) -> TierStats:
        """These counts, and what a catalog holds."""
        used_bytes, in_use_bytes = catalog.used_bytes, catalog.in_use_bytes
        return TierStats(
            name=name,
            capacity_bytes=catalog.capacity_bytes,
            in_use_bytes=in_use_bytes,
            reusable_bytes=used_bytes - in_use_bytes,
            free_bytes=catalog.capacity_bytes - used_bytes,
            num_objects=len(catalog),
            num_evictions=catalog.num_evictions,
            misses=self.misses,
            puts=self.puts,
        )


def _counted(name_to_number: dict[str, int]) -> dict[str, int]:
    return {str(name): number for name, number in name_to_number.items() if number}
