"""Blocks that bear the same labels as one entry: what somebody wants to see of a full cache."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from kvkeep.cache import BlockReport
from kvkeep.server.cache_work import shown_time
from kvkeep.spec import BlockKey

__all__ = ["grouped"]

_ID_CHARACTERS = 16


@dataclass(slots=True)
class _Group:
    """What blocks of equal sessions, tags, pins and tenant are together."""

    first: BlockReport
    num_blocks: int = 0
    num_bytes: int = 0
    place_to_blocks: Counter[str] = field(default_factory=Counter)
    used_at: float = 0.0
    ends: list[float | None] = field(default_factory=list)


def grouped(
    reports: Sequence[BlockReport],
    block_size: int,
    named: Callable[[dict[str, Any], BlockKey], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Rows as JSON, the largest first; `named` adds whose namespace it is."""
    groups: dict[bytes, _Group] = {}
    for report in reports:
        name = _name(report)
        group = groups.setdefault(name, _Group(report))
        group.num_blocks += 1
        group.num_bytes += report.num_bytes
        group.place_to_blocks.update(report.places)
        group.used_at = max(group.used_at, report.used_at or report.created_at)
        group.ends.append(report.expires_at)
    order = sorted(groups.items(), key=lambda item: (-item[1].num_bytes, item[0]))
    return [named(_fields(name, group, block_size), group.first.namespace) for name, group in order]


def _name(report: BlockReport) -> bytes:
    parts = (report.namespace, report.sessions, report.is_shared, report.tags, report.pins)
    return sha256(repr(parts).encode()).digest()


def _fields(name: bytes, group: _Group, block_size: int) -> dict[str, Any]:
    ends = [end for end in group.ends if end is not None]
    is_lasting = len(ends) < len(group.ends)
    return {
        "object": "cache.entry_group",
        "id": name.hex()[:_ID_CHARACTERS],
        "sessions": list(group.first.sessions),
        "shared": group.first.is_shared,
        "tags": list(group.first.tags),
        "pins": list(group.first.pins),
        "blocks": group.num_blocks,
        "tokens": group.num_blocks * block_size,
        "bytes": group.num_bytes,
        "tiers": dict(group.place_to_blocks),
        "used_at": shown_time(group.used_at),
        "expires_at": None if is_lasting else shown_time(max(ends)),
    }
