"""The blocks of leases: handed out, filled with what was there before, and given back."""

from collections.abc import Sequence
from typing import cast

from kvkeep.blocks import BlockLedger
from kvkeep.cache.base import BlockStore
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.sealing import state_entry
from kvkeep.planning import Known, PartialHit
from kvkeep.spec import BlockId, KVSpec, LayerKind, Span

__all__ = ["Places"]


class Places:
    """What moves between the ledgers' pools and the tables of leases, for every KV group."""

    def __init__(self, spec: KVSpec, ledgers: Sequence[BlockLedger], store: BlockStore) -> None:
        self.spec = spec
        self.ledgers = ledgers
        self._store = store

    def share(
        self, table: BlockTable, numbers: Sequence[int], known: Sequence[Known], group: int
    ) -> None:
        """Hold the given numbers of `known`, all of which are on the device."""
        if not numbers:
            return
        if len(numbers) == numbers[-1] + 1:
            table.blocks = cast("list[BlockId | None]", list(known[: len(numbers)]))
        else:
            table.grow(numbers[-1] + 1)
            for number in numbers:
                table.blocks[number] = cast("BlockId", known[number])
        self.ledgers[group].pool.acquire(table.held())

    def begin(
        self, lease: Lease, partial: PartialHit | None, group_to_loads: Sequence[Sequence[int]]
    ) -> bool:
        """Copy a partial hit, place the running states, and make room for what is to be loaded.

        False, and nothing is evicted, without room for all of it.
        """
        number, sources = (partial.block, partial.group_blocks) if partial else (0, ())
        # Held while room is made, so that a copy's source cannot be what is evicted for it.
        held = {
            group: source
            for group, source in enumerate(sources)
            if number not in lease.tables[group].read_only
        }
        for group, source in held.items():
            self.ledgers[group].pool.acquire([source])
        has_room = self._has_room(number, held, group_to_loads)
        if has_room:
            self._allocate_states(lease)
            for group, loads in enumerate(group_to_loads):
                if loads:
                    self.allocate_into(lease, group, loads)
        for group, source in held.items():
            if has_room:
                self.allocate_into(lease, group, [number])
                self._store.copy_block(group, source, lease.tables[group].place(number))
            self.release(group, [source])
        return has_room

    def _has_room(
        self, number: int, held: dict[int, BlockId], group_to_loads: Sequence[Sequence[int]]
    ) -> bool:
        for group, (ledger, loads) in enumerate(zip(self.ledgers, group_to_loads, strict=True)):
            num_blocks = len(loads) + (group in held)
            num_blocks += ledger.spec.kind is LayerKind.RECURRENT
            with_first = (group in held and number == 0) or 0 in loads[:1]
            if num_blocks and not ledger.pool.has_room(num_blocks, with_first=with_first):
                return False
        return True

    def _allocate_states(self, lease: Lease) -> None:
        for group, ledger in enumerate(self.ledgers):
            if ledger.spec.kind is LayerKind.RECURRENT:
                allocation = ledger.allocate(1)
                assert allocation is not None
                lease.states[group] = allocation.blocks[0]

    def missing_blocks(self, lease: Lease, group: int, spans: Sequence[Span]) -> list[int]:
        """Numbers at which `spans` will write and the lease has no private block."""
        ledger, table = self.ledgers[group], lease.tables[group]
        if ledger.spec.kind is LayerKind.RECURRENT:
            return []
        size = self.spec.block_size
        missing: list[int] = []
        for span in spans:
            last = (span.stop - 1) // size
            if last >= len(table.blocks):
                table.grow(last + 1)
            for number in range(span.start // size, last + 1):
                block = table.blocks[number]
                if block is None or not (number in table.read_only or ledger.is_private(block)):
                    missing.append(number)
        # Two spans of one step can touch the same block.
        return missing if len(spans) == 1 else sorted(set(missing))

    def allocate_into(self, lease: Lease, group: int, numbers: Sequence[int]) -> None:
        """Fresh blocks at the given numbers, in order, with the content of what was there before."""
        table = lease.tables[group]
        table.grow(max(numbers) + 1)
        allocation = self.ledgers[group].allocate(len(numbers), with_first=numbers[0] == 0)
        assert allocation is not None
        self._store.poison(group, allocation.blocks)
        for number, block in zip(numbers, allocation.blocks, strict=True):
            shared = table.blocks[number]
            table.blocks[number] = block
            if shared is not None:
                self._store.copy_block(group, shared, block)
                self.release(group, [shared])

    def load_state(self, lease: Lease, group: int, spans: Sequence[Span]) -> None:
        """Before a gap's first step its recurrent state is the saved one at its start."""
        assert len(spans) == 1, "recurrent models compute one span of a request a step"
        span, size = spans[0], self.spec.block_size
        if span.start == 0:
            self._store.reset_state(group, lease.states[group])
        elif span.start % size == 0:
            number = span.start // size - 1
            blocks = lease.tables[group].blocks
            saved = blocks[number] if number < len(blocks) else None
            if saved is not None:
                self._store.copy_block(group, saved, lease.states[group])

    def keep_state(self, lease: Lease, group: int, position: int) -> None:
        """Publish a copy of the state at a block's end, while there is room for copies."""
        ledger = self.ledgers[group]
        entry = state_entry(lease.chain, position)
        if entry is None or ledger.get(entry.key) is not None:
            return
        allocation = ledger.allocate(1)
        if allocation is not None:
            self._store.copy_block(group, lease.states[group], allocation.blocks[0])
            ledger.seal(allocation.blocks, [entry])
            self.release(group, allocation.blocks)

    def release_passed(self, lease: Lease, group: int) -> list[BlockId]:
        """Give back, and return, the blocks before the window of every position still to come."""
        table, spec = lease.tables[group], self.ledgers[group].spec
        first = spec.first_needed(lease.next_position) // self.spec.block_size
        if first <= table.first_held:
            return []
        passed = [block for block in table.blocks[table.first_held : first] if block is not None]
        table.blocks[table.first_held : first] = [None] * (first - table.first_held)
        table.first_held = first
        self.release(group, passed)
        return passed

    def release(self, group: int, blocks: Sequence[BlockId]) -> None:
        """Take a holder from each block; what has no key is free then."""
        self._store.poison(group, self.ledgers[group].pool.release(blocks))

    def forget(self, group: int, blocks: Sequence[BlockId]) -> list[BlockId]:
        """Withdraw sealed content; returns the blocks that became free."""
        freed = self.ledgers[group].forget(blocks)
        self._store.poison(group, freed)
        return freed
