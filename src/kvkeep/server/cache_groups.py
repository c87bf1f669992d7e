"""Blocks that bear the same labels as one entry: what somebody wants to see of a full cache."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TypeAlias

from kvkeep.cache import BlockReport
from kvkeep.cache.slices import Bits
from kvkeep.server.cache_work import shown_time
from kvkeep.spec import BlockKey

__all__ = ["BlockGroup", "Groups"]

_ID_CHARACTERS = 16
# Groups that get their names in one go.
_BIT = 128

# Namespace, sessions, whether others use it too, tags and pins.
_Borne: TypeAlias = tuple[BlockKey, tuple[str, ...], bool, tuple[str, ...], tuple[str, ...]]


@dataclass(slots=True)
class BlockGroup:
    """What blocks of equal sessions, tags, pins and tenant are together."""

    first: BlockReport
    block_size: int
    name: bytes = b""
    num_blocks: int = 0
    num_bytes: int = 0
    place_to_blocks: Counter[str] = field(default_factory=Counter)
    used_at: float = 0.0
    last_end: float = 0.0
    is_lasting: bool = False

    @property
    def id(self) -> str:
        """Its name as text."""
        return self.name.hex()[:_ID_CHARACTERS]

    def add(self, report: BlockReport) -> None:
        """Count one more block."""
        self.num_blocks += 1
        self.num_bytes += report.num_bytes
        self.place_to_blocks.update(report.places)
        self.used_at = max(self.used_at, report.used_at or report.created_at)
        self.is_lasting = self.is_lasting or report.expires_at is None
        self.last_end = max(self.last_end, report.expires_at or 0.0)

    def fields(self) -> dict[str, Any]:
        """It as JSON."""
        return {
            "object": "cache.entry_group",
            "id": self.id,
            "sessions": list(self.first.sessions),
            "shared": self.first.is_shared,
            "tags": list(self.first.tags),
            "pins": list(self.first.pins),
            "blocks": self.num_blocks,
            "tokens": self.num_blocks * self.block_size,
            "bytes": self.num_bytes,
            "tiers": dict(self.place_to_blocks),
            "used_at": shown_time(self.used_at),
            "expires_at": None if self.is_lasting else shown_time(self.last_end),
        }


class Groups:
    """Groups of blocks that come one after another."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._borne_to_group: dict[_Borne, BlockGroup] = {}

    def add(self, reports: Iterable[BlockReport]) -> None:
        """Take some more blocks."""
        for report in reports:
            borne = _borne_by(report)
            group = self._borne_to_group.get(borne)
            if group is None:
                group = self._borne_to_group[borne] = BlockGroup(report, self._block_size)
            group.add(report)

    def named(self) -> Bits[dict[bytes, BlockGroup]]:
        """All groups, by names that are the same in every list."""
        named = {}
        for number, (borne, group) in enumerate(self._borne_to_group.items()):
            group.name = sha256(repr(borne).encode()).digest()
            named[group.name] = group
            if number % _BIT == _BIT - 1:
                yield
        return named


def _borne_by(report: BlockReport) -> _Borne:
    return (report.namespace, report.sessions, report.is_shared, report.tags, report.pins)
