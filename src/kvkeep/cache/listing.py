"""What the cache knows of blocks: where they lie, and reports."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvkeep.blocks import BlockLedger, stored_key
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import BlockReport, Register
from kvkeep.planning import DEVICE
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Presence

__all__ = ["Held", "held_blocks", "list_blocks"]


@dataclass(frozen=True, slots=True)
class Held:
    """Where a block lies, and the bytes that it takes there."""

    place_to_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """What it takes in all places together."""
        return sum(self.place_to_bytes.values())


def held_blocks(
    keys: Sequence[BlockKey],
    ledgers: Sequence[BlockLedger],
    below: Hierarchy | None,
    block_size: int,
) -> list[Held]:
    """Where each block lies. Of tiers behind wires only what is known without asking."""
    found = [Held() for _ in keys]
    for ledger in ledgers:
        for key, held in zip(keys, found, strict=True):
            block = ledger.get(key)
            if block is not None:
                _add(held, DEVICE, ledger.num_bytes([block], block_size))
    if below is None:
        return found
    for at in below.stack.local:
        tier = below.stack.tiers[at]
        for group in range(len(ledgers)):
            num_bytes = below.object_bytes(group)
            there = tier.find([stored_key(key, group) for key in keys])
            for held, presence in zip(found, there, strict=True):
                if presence is Presence.PRESENT:
                    _add(held, tier.name, num_bytes)
    return found


def list_blocks(
    keys: Sequence[BlockKey],
    register: Register,
    ledgers: Sequence[BlockLedger],
    below: Hierarchy | None,
    block_size: int,
) -> Iterator[BlockReport]:
    """A report on each block that has labels."""
    for key, held in zip(keys, held_blocks(keys, ledgers, below, block_size), strict=True):
        labels = register.get(key)
        if labels is None:
            continue
        yield BlockReport(
            key=key,
            namespace=labels.namespace,
            places=tuple(held.place_to_bytes),
            num_bytes=held.num_bytes,
            sessions=tuple(sorted(labels.sessions)),
            is_shared=labels.is_shared,
            tags=tuple(sorted(labels.tags)),
            pins=tuple(sorted(labels.pins)),
            priority=labels.priority,
            created_at=labels.created_at,
            used_at=register.used_at(key),
            expires_at=None if labels.ends_at == float("inf") else labels.ends_at,
        )


def _add(held: Held, place: str, num_bytes: int) -> None:
    held.place_to_bytes[place] = held.place_to_bytes.get(place, 0) + num_bytes
