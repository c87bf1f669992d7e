"""The KV cache as one object: coverage, reserve, commit, release, fork, drop, verify, stats.

Bookkeeping only: the bytes are in a BlockStore (the arena), told here which place to copy to which.
Nothing is visible before its bytes are: a block gets its key in `commit`, after the step that wrote.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvkeep.blocks import BlockLedger, BlockPool, TokenChain
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.lookup import RequestPlan, plan_request
from kvkeep.cache.receipts import CacheStats, DropReceipt, GroupStats, VerifyReport
from kvkeep.cache.sealing import seal_spans, state_entry
from kvkeep.cache.verify import find_problems
from kvkeep.planning import Coverage, PartialHit, coverage_of
from kvkeep.policies import make_policy
from kvkeep.spec import BlockId, KVSpec, LayerKind, Span

__all__ = ["BlockStore", "KVCache"]


class BlockStore(Protocol):
    """Where the bytes of blocks are; groups are numbered as in the spec."""

    def copy_block(self, group: int, source: BlockId, target: BlockId) -> None:
        """Copy the whole content of `source` to `target`."""

    def reset_state(self, group: int, block: BlockId) -> None:
        """Make a recurrent state the one before the first token."""

    def poison(self, group: int, blocks: Sequence[BlockId]) -> None:
        """Make freed content unusable where that is asked for in tests; else do nothing."""


class KVCache:
    """Who holds which block of every KV group, what each holds, and what a request still needs.

    Blocks are counted by class, `KVSpec.block_classes`: the first blocks of a group may be one of their own.
    """

    def __init__(
        self,
        spec: KVSpec,
        class_num_blocks: Sequence[int],
        store: BlockStore,
        *,
        policy: str = "lru",
    ) -> None:
        self.spec = spec
        self._store = store
        pools = [
            BlockPool(num_blocks, make_policy(policy))
            for _, num_blocks in zip(spec.block_classes, class_num_blocks, strict=True)
        ]
        firsts = dict(zip(spec.first_block_groups, pools[len(spec.groups) :], strict=True))
        self._pools = pools
        self._ledgers = [
            BlockLedger(group, pools[at], firsts.get(at)) for at, group in enumerate(spec.groups)
        ]
        self._leases: set[Lease] = set()
        self._reused_tokens = 0
        self._computed_tokens = 0

    # --- questions -------------------------------------------------------------------------------

    def coverage(self, chain: TokenChain) -> Coverage:
        """What is known of `chain`, as runs. Changes nothing."""
        if not len(chain):
            return Coverage(0, ())
        return coverage_of(len(chain), self._plan(chain).coverage)

    def gaps(self, chain: TokenChain) -> tuple[Span, ...]:
        """What a request for `chain` would compute, the last token included. Changes nothing."""
        return self._plan(chain).coverage.gaps if len(chain) else ()

    def blocks_needed(self, num_tokens: int, span_tokens: int) -> list[int]:
        """For each class, the blocks that a request holds at its longest, `span_tokens` a step."""
        size, firsts = self.spec.block_size, self.spec.first_block_groups
        needed = [
            1
            if group.kind is LayerKind.RECURRENT
            else min(
                self.spec.num_blocks(num_tokens),
                self.spec.num_blocks((group.window or num_tokens) + span_tokens + size),
            )
            for group in self.spec.groups
        ]
        for group in firsts:
            needed[group] -= 1
        return needed + [1] * len(firsts)

    def num_blocks(self) -> list[int]:
        """For each class, the blocks there are."""
        return [pool.num_blocks for pool in self._pools]

    def num_available(self) -> list[int]:
        """For each class, the blocks that are free or can be evicted."""
        return [pool.num_available for pool in self._pools]

    # --- the life of a lease ---------------------------------------------------------------------

    def reserve(self, chain: TokenChain, *, read: bool = True, write: bool = True) -> Lease | None:
        """Hold what is known of `chain` (at least one token) for a request.

        With `read=False` nothing is shared; with `write=False` nothing will be published. Returns
        None, and forgets nothing, when there is no room even for what must be copied to begin. A
        request alone in the cache always begins, if need be without sharing.
        """
        assert len(chain) > 0
        assert chain.block_size == self.spec.block_size
        request = self._plan(chain, read=read)
        plan = request.coverage
        tables = [BlockTable() for _ in self._ledgers]
        lease = Lease(chain, tables, plan.gaps, publishes=write, close=self._close)
        self._leases.add(lease)
        for group, ledger in enumerate(self._ledgers):
            known, table = request.group_blocks[group].blocks, tables[group]
            self._share(table, plan.shared[group], known, ledger)
            table.read_only = plan.shared_inside_gaps(group, self.spec.block_size)
        if not self._begin(lease, plan.partial):
            lease.release()
            # Alone, a request has no room because of what it would itself share.
            is_alone = read and not self._leases
            return self.reserve(chain, read=False, write=write) if is_alone else None
        self._reused_tokens += lease.reused_tokens
        return lease

    def extend(self, lease: Lease, spans: Sequence[Span]) -> bool:
        """Give the lease private blocks wherever `spans`, the front of its gaps, will write.

        Returns False, and changes nothing, when there is no room. Blocks shared for later gaps take
        room too: a lease that is alone and has none is to be released, and reserved without `read`.
        """
        missing = [self._missing_blocks(lease, group, spans) for group in range(len(self._ledgers))]
        for numbers, ledger in zip(missing, self._ledgers, strict=True):
            if not ledger.pool.has_room(len(numbers), with_first=0 in numbers):
                return False
        for group, numbers in enumerate(missing):
            if numbers:
                self._allocate_into(lease, group, numbers)
        for group in lease.states:
            self._load_state(lease, group, spans)
        return True

    def commit(self, lease: Lease, spans: Sequence[Span]) -> None:
        """Publish what a step has computed; let go of what no later step of the request reads."""
        self._computed_tokens += sum(len(span) for span in spans)
        lease.advance(spans)
        for group, ledger in enumerate(self._ledgers):
            if lease.publishes:
                if ledger.spec.kind is LayerKind.RECURRENT:
                    self._keep_state(lease, group, spans[-1].stop)
                else:
                    seal_spans(ledger, lease.chain, lease.tables[group], spans)
            if ledger.spec.window is not None:
                self._release_passed(lease, group)

    def truncate(self, lease: Lease, num_tokens: int) -> bool:
        """Forget the request's tokens from `num_tokens` on.

        Returns False, and changes nothing, when a window has left behind what would be read again:
        release the lease and reserve a new one. A recurrent state is the caller's to restore.
        """
        assert num_tokens <= lease.next_position
        size, num_blocks = self.spec.block_size, self.spec.num_blocks(num_tokens)
        for group, table in enumerate(lease.tables):
            first = self.spec.groups[group].first_needed(num_tokens) // size
            needed = table.blocks[first:num_blocks]
            if group not in lease.states and (len(needed) < num_blocks - first or None in needed):
                return False
        lease.chain.truncate(num_tokens)
        lease.gaps.clear()
        for group, table in enumerate(lease.tables):
            # A state kept inside the block that is cut has seen what is forgotten.
            num_kept = num_tokens // size if group in lease.states else num_blocks
            self._release(group, table.cut(num_tokens // size, num_kept))
        return True

    def fork(self, lease: Lease) -> Lease | None:
        """A second lease on the same blocks; whoever writes into a shared tail copies it first.

        Returns None, and changes nothing, when there is no room for the copy of a recurrent state.
        """
        child = Lease(
            lease.chain.fork(),
            [table.fork() for table in lease.tables],
            lease.gaps,
            publishes=lease.publishes,
            close=self._close,
        )
        for ledger, table in zip(self._ledgers, child.tables, strict=True):
            ledger.pool.acquire(table.held())
        self._leases.add(child)
        if not self._begin(child, None):
            child.release()
            return None
        for group, state in lease.states.items():
            self._store.copy_block(group, state, child.states[group])
        return child

    # --- administration --------------------------------------------------------------------------

    def drop(self, chain: TokenChain, blocks: Iterable[int]) -> DropReceipt:
        """Forget the given full blocks of `chain`, by number, in every group."""
        keys = [chain.keys[block] for block in sorted(set(blocks))]
        found = [
            [block for key in keys if (block := ledger.get(key)) is not None]
            for ledger in self._ledgers
        ]
        return self._forget(found)

    def clear(self) -> DropReceipt:
        """Forget all content; running requests keep their blocks as private ones."""
        return self._forget([ledger.sealed_blocks() for ledger in self._ledgers])

    def verify(self) -> VerifyReport:
        """Check every invariant of pools, indexes and leases. Changes nothing."""
        problems = find_problems(self._ledgers, self._leases)
        return VerifyReport(blocks_checked=sum(self.num_blocks()), problems=tuple(problems))

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free."""
        groups = tuple(
            GroupStats(
                name=one.name,
                layers=one.layers,
                num_blocks=pool.num_blocks,
                block_bytes=one.block_bytes(self.spec.block_size),
                in_use=pool.num_held,
                reusable=pool.num_evictable,
                free=pool.num_free,
                num_evictions=pool.num_evictions,
            )
            for one, pool in zip(self.spec.block_classes, self._pools, strict=True)
        )
        return CacheStats(
            capacity_bytes=sum(group.num_blocks * group.block_bytes for group in groups),
            in_use_bytes=sum(group.in_use * group.block_bytes for group in groups),
            reusable_bytes=sum(group.reusable * group.block_bytes for group in groups),
            free_bytes=sum(group.free * group.block_bytes for group in groups),
            open_leases=len(self._leases),
            reused_tokens=self._reused_tokens,
            computed_tokens=self._computed_tokens,
            groups=groups,
        )

    # --- parts -----------------------------------------------------------------------------------

    def _plan(self, chain: TokenChain, *, read: bool = True) -> RequestPlan:
        return plan_request(self.spec, self._ledgers, chain, read=read)

    def _share(
        self,
        table: BlockTable,
        numbers: Sequence[int],
        known: Sequence[BlockId | None],
        ledger: BlockLedger,
    ) -> None:
        if not numbers:
            return
        if len(numbers) == numbers[-1] + 1:
            table.blocks = list(known[: len(numbers)])
        else:
            table.grow(numbers[-1] + 1)
            for number in numbers:
                table.blocks[number] = known[number]
        ledger.pool.acquire(table.held())

    def _begin(self, lease: Lease, partial: PartialHit | None) -> bool:
        """Copy a partial hit and place the running states; False, nothing evicted, without room."""
        number, sources = (partial.block, partial.group_blocks) if partial else (0, ())
        # Held while room is made, so that a copy's source cannot be what is evicted for it.
        held = {
            group: source
            for group, source in enumerate(sources)
            if number not in lease.tables[group].read_only
        }
        for group, source in held.items():
            self._ledgers[group].pool.acquire([source])
        has_room = all(
            ledger.pool.has_room(1, with_first=number == 0)
            for group, ledger in enumerate(self._ledgers)
            if group in held or ledger.spec.kind is LayerKind.RECURRENT
        )
        if has_room:
            self._allocate_states(lease)
        for group, source in held.items():
            if has_room:
                self._allocate_into(lease, group, [number])
                self._store.copy_block(group, source, lease.tables[group].place(number))
            self._release(group, [source])
        return has_room

    def _allocate_states(self, lease: Lease) -> None:
        for group, ledger in enumerate(self._ledgers):
            if ledger.spec.kind is LayerKind.RECURRENT:
                allocation = ledger.allocate(1)
                assert allocation is not None
                lease.states[group] = allocation.blocks[0]

    def _missing_blocks(self, lease: Lease, group: int, spans: Sequence[Span]) -> list[int]:
        ledger, table = self._ledgers[group], lease.tables[group]
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

    def _allocate_into(self, lease: Lease, group: int, numbers: Sequence[int]) -> None:
        """Fresh blocks at the given numbers, in order, with the content of what was there before."""
        table = lease.tables[group]
        table.grow(max(numbers) + 1)
        allocation = self._ledgers[group].allocate(len(numbers), with_first=numbers[0] == 0)
        assert allocation is not None
        self._store.poison(group, allocation.blocks)
        for number, block in zip(numbers, allocation.blocks, strict=True):
            shared = table.blocks[number]
            table.blocks[number] = block
            if shared is not None:
                self._store.copy_block(group, shared, block)
                self._release(group, [shared])

    def _load_state(self, lease: Lease, group: int, spans: Sequence[Span]) -> None:
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

    def _keep_state(self, lease: Lease, group: int, position: int) -> None:
        """Publish a copy of the state at a block's end, while there is room for copies."""
        ledger = self._ledgers[group]
        entry = state_entry(lease.chain, position)
        if entry is None or ledger.get(entry.key) is not None:
            return
        allocation = ledger.allocate(1)
        if allocation is not None:
            self._store.copy_block(group, lease.states[group], allocation.blocks[0])
            ledger.seal(allocation.blocks, [entry])
            self._release(group, allocation.blocks)

    def _release_passed(self, lease: Lease, group: int) -> None:
        """Give back the blocks that lie before the window of every position still to come."""
        table, spec = lease.tables[group], self._ledgers[group].spec
        first = spec.first_needed(lease.next_position) // self.spec.block_size
        if first <= table.first_held:
            return
        passed = table.blocks[table.first_held : first]
        table.blocks[table.first_held : first] = [None] * len(passed)
        table.first_held = first
        self._release(group, [block for block in passed if block is not None])

    def _release(self, group: int, blocks: Sequence[BlockId]) -> None:
        self._store.poison(group, self._ledgers[group].pool.release(blocks))

    def _close(self, lease: Lease) -> None:
        self._leases.remove(lease)
        for group, table in enumerate(lease.tables):
            self._release(group, table.held())
        for group, state in lease.states.items():
            self._release(group, [state])

    def _forget(self, group_blocks: Sequence[Sequence[BlockId]]) -> DropReceipt:
        num_held = num_bytes = 0
        for group, blocks in enumerate(group_blocks):
            ledger = self._ledgers[group]
            freed = ledger.forget(blocks)
            self._store.poison(group, freed)
            num_held += len(blocks) - len(freed)
            num_bytes += ledger.num_bytes(blocks, self.spec.block_size)
        return DropReceipt(
            num_blocks=sum(len(blocks) for blocks in group_blocks),
            num_bytes=num_bytes,
            num_held=num_held,
        )
