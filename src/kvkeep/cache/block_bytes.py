"""Blocks of a cache as bytes, read and entered one at a time: for export and import."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvkeep.blocks import BlockLedger, Entry, TokenChain, stored_key
from kvkeep.cache.base import PayloadStore
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.places import Places
from kvkeep.cache.sealing import block_entry
from kvkeep.cache.stored_blocks import put_block, wanted_header
from kvkeep.cache.upkeep import Upkeep
from kvkeep.spec import BlockId, KVSpec
from kvkeep.tiers.base import Occasion, PutOutcome
from kvkeep.tiers.reading import Verified, read_block

__all__ = ["BlockBytes", "FoundBlock", "InsertOutcome"]


class InsertOutcome(StrEnum):
    """What became of a block that was brought from outside."""

    ADDED = "added"
    PRESENT = "present"
    NO_ROOM = "no room"


@dataclass(frozen=True, slots=True)
class FoundBlock:
    """A known block's payload in its layout; None when it is known and could not be read."""

    layout: str
    payload: memoryview | None


class BlockBytes:
    """Reads and writes payloads of the blocks of a KVCache; for the thread that owns it."""

    def __init__(
        self,
        spec: KVSpec,
        places: Places,
        below: Hierarchy | None,
        payloads: PayloadStore,
        upkeep: Upkeep,
    ) -> None:
        self._spec = spec
        self._places = places
        self._below = below
        self._payloads = payloads
        self._upkeep = upkeep

    def read(self, chain: TokenChain, group: int, number: int) -> FoundBlock | None:
        """A full block of a chain, from the device or a tier; None where it is not known."""
        entry = block_entry(chain, number)
        if self._upkeep.is_dead(entry.key):
            return None
        block = self._ledgers[group].get(entry.key)
        layout = self._payloads.layout_name(group)
        if block is not None:
            return FoundBlock(layout, self._payloads.view(group, block))
        if self._below is None:
            return None
        lookup = self._below.lookups.ask([stored_key(entry.key, group)])
        source = self._below.find(group, [entry.key], lookup).get(entry.key)
        if source is None:
            return None
        size = self._payloads.num_bytes(group, self._any_place(group, entry))
        payload = memoryview(bytearray(size))
        found = read_block(
            self._below.stack.tiers[source.at],
            stored_key(entry.key, group),
            wanted_header(self._spec, group, entry, size, layout),
            self._spec.block_size,
            payload,
        )
        if isinstance(found, Verified):
            return FoundBlock(found.layout, payload)
        return FoundBlock(layout, None)

    def insert(self, entry: Entry, group: int, payload: memoryview, layout: str) -> InsertOutcome:
        """Enter a block where there is room without evicting: on the device, else in a tier."""
        ledger = self._ledgers[group]
        if self._upkeep.is_dead(entry.key):
            self._upkeep.forgetting.at_once((entry.key,), "expired")
        if ledger.get(entry.key) is not None:
            return InsertOutcome.PRESENT
        is_first = entry.parent == entry.namespace
        if payload.nbytes == self._payloads.num_bytes(group, self._any_place(group, entry)):
            if ledger.pool.has_free(with_first=is_first):
                return self._insert_here(entry, group, payload, layout)
            if self._below is not None:
                return self._insert_below(self._below, entry, group, payload, layout)
        return InsertOutcome.NO_ROOM

    @property
    def _ledgers(self) -> Sequence[BlockLedger]:
        return self._places.ledgers

    def _any_place(self, group: int, entry: Entry) -> BlockId:
        """A place of the kind where such a block lies."""
        is_first = entry.parent == entry.namespace
        pool = self._ledgers[group].pool
        return BlockId(pool.num_blocks - 1 if is_first else 0)

    def _insert_here(
        self, entry: Entry, group: int, payload: memoryview, layout: str
    ) -> InsertOutcome:
        ledger = self._ledgers[group]
        allocation = ledger.allocate(1, with_first=entry.parent == entry.namespace)
        assert allocation is not None
        (block,) = allocation.blocks
        target = self._payloads.target(group, block)
        target[:] = payload
        is_adopted = self._payloads.adopt(group, block, target, layout)
        if is_adopted:
            ledger.seal([block], [entry])
            self._upkeep.enter(entry)
        self._places.release(group, [block])
        return InsertOutcome.ADDED if is_adopted else InsertOutcome.NO_ROOM

    def _insert_below(
        self, below: Hierarchy, entry: Entry, group: int, payload: memoryview, layout: str
    ) -> InsertOutcome:
        labels = self._upkeep.enter(entry)
        outcomes = put_block(
            below.stack, self._spec, group, entry, payload, layout, Occasion.IDLE, labels
        )
        if below.copies.on_copied is not None:
            below.copies.on_copied(entry.key, outcomes, labels)
        if PutOutcome.STORED in outcomes.values():
            return InsertOutcome.ADDED
        is_there = PutOutcome.PRESENT in outcomes.values()
        return InsertOutcome.PRESENT if is_there else InsertOutcome.NO_ROOM
