"""Which pages of a piece of memory are free, as runs that are cut when taken and joined when given back."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["PageRuns", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """Pages `first` to `first + num_pages - 1`."""

    first: int
    num_pages: int


class PageRuns:
    """The free ones of pages 0 to `num_pages - 1`. Not thread-safe.

    Neighbours are always joined, so that no two free runs touch. The smallest run that is long enough is
    taken; where none is, the longest ones are, so that what is scattered is in as few pieces as can be.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_free = 0
        self._first_to_size: dict[int, int] = {}
        self._stop_to_first: dict[int, int] = {}
        # (pages, first page), sorted: the order in which runs are chosen.
        self._by_size: list[tuple[int, int]] = []
        self._add(0, num_pages)

    def __len__(self) -> int:
        """How many free runs there are."""
        return len(self._by_size)

    def take(self, num_pages: int) -> tuple[Run, ...]:
        """Take `num_pages`, which the caller guarantees to be free."""
        assert num_pages <= self.num_free
        runs = []
        while num_pages:
            at = bisect_left(self._by_size, (num_pages, 0))
            size, first = self._by_size[min(at, len(self._by_size) - 1)]
            self._discard(first, size)
            num_taken = min(size, num_pages)
            if size > num_taken:
                self._add(first + num_taken, size - num_taken)
            runs.append(Run(first, num_taken))
            num_pages -= num_taken
        return tuple(runs)

    def give_back(self, runs: Iterable[Run]) -> None:
        """Make pages free again."""
        for run in runs:
            first, size = run.first, run.num_pages
            before = self._stop_to_first.get(first)
            if before is not None:
                size += first - before
                self._discard(before, first - before)
                first = before
            behind = self._first_to_size.get(first + size)
            if behind is not None:
                self._discard(first + size, behind)
                size += behind
            self._add(first, size)

    def _add(self, first: int, size: int) -> None:
        item = (size, first)
        self._by_size.insert(bisect_left(self._by_size, item), item)
        self._first_to_size[first] = size
        self._stop_to_first[first + size] = first
        self.num_free += size

    def _discard(self, first: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, first))]
        del self._first_to_size[first]
        del self._stop_to_first[first + size]
        self.num_free -= size
