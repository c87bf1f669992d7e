"""Blocks of equal labels as one group, and purges as tombstones that are judged when somebody looks.

A purge of 100,000 blocks takes a second; a tombstone stands at once. What it means, and nothing else, is gone
from that moment on: blocks that fit and were labelled before it. What is computed anew meanwhile is in a
younger group, even under the same labels at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kvkeep.cache.lifetimes.labels import Labels
from kvkeep.spec import BlockKey

__all__ = ["LabelGroup", "Tombstone"]


class LabelGroup:
    """All keys of equal labels. Compared by identity, which is what makes the common case quick."""

    __slots__ = ("encoded", "keys", "labels", "number")

    def __init__(self, labels: Labels, number: int) -> None:
        self.labels = labels
        self.keys: set[BlockKey] = set()
        self.encoded: bytes | None = None
        # Groups and tombstones are numbered in the order in which they came.
        self.number = number


@dataclass(eq=False, slots=True)
class Tombstone:
    """What a purge means, by labels and key; `fits_key` is None where labels say it all."""

    fits: Callable[[Labels], bool]
    fits_key: Callable[[BlockKey], bool] | None = None
    number: int = 0
    # Keys are asked for in runs of one group.
    _last: LabelGroup | None = None
    _fits_last: bool = False

    def means_some_of(self, group: LabelGroup) -> bool:
        """Whether blocks of that group are meant, as far as labels tell."""
        if group is not self._last:
            self._fits_last = group.number < self.number and self.fits(group.labels)
            self._last = group
        return self._fits_last

    def means(self, key: BlockKey, group: LabelGroup) -> bool:
        """Whether a block of that group is meant."""
        return self.means_some_of(group) and (self.fits_key is None or self.fits_key(key))
