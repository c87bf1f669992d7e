"""What the cache knows of blocks, as reports."""

from collections.abc import Collection, Iterator, Sequence

from kvkeep.blocks import BlockLedger, stored_key
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import BlockReport, Register
from kvkeep.planning import DEVICE
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Presence

__all__ = ["list_blocks"]


def list_blocks(
    keys: Collection[BlockKey],
    register: Register,
    ledgers: Sequence[BlockLedger],
    below: Hierarchy | None,
    block_size: int,
) -> Iterator[BlockReport]:
    """A report on each block that has labels. Of tiers behind wires only what is known without asking."""
    for key in keys:
        labels = register.get(key)
        if labels is None:
            continue
        num_bytes, places = 0, []
        for ledger in ledgers:
            block = ledger.get(key)
            if block is not None:
                num_bytes += ledger.num_bytes([block], block_size)
                places = [DEVICE]
        for at in () if below is None else below.stack.local:
            assert below is not None
            stored = [stored_key(key, group) for group in range(len(ledgers))]
            there = below.stack.tiers[at].find(stored)
            if Presence.PRESENT in there:
                places.append(below.stack.tiers[at].name)
                held = [group for group, one in enumerate(there) if one is Presence.PRESENT]
                num_bytes += sum(map(below.object_bytes, held))
        yield BlockReport(
            key=key,
            namespace=labels.namespace,
            places=tuple(places),
            num_bytes=num_bytes,
            sessions=tuple(sorted(labels.sessions)),
            is_shared=labels.is_shared,
            tags=tuple(sorted(labels.tags)),
            pins=tuple(sorted(labels.pins)),
            priority=labels.priority,
            created_at=labels.created_at,
            used_at=register.used_at(key),
            expires_at=None if labels.ends_at == float("inf") else labels.ends_at,
        )
