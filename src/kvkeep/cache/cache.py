"""The KV cache as one object: coverage, reserve, commit, release, fork, drop, verify, stats.

Bookkeeping only: the bytes are in a BlockStore (the arena), told here which place to copy to which.
Nothing is visible before its bytes are: a block gets its key in `commit`, after the step that wrote.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from kvkeep.blocks import BlockLedger, BlockPool, TokenChain, stored_key
from kvkeep.cache.base import BlockStore, PayloadStore
from kvkeep.cache.block_bytes import BlockBytes
from kvkeep.cache.counting import count_blocks
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.lookup import RequestPlan, plan_request, without_loads
from kvkeep.cache.lookups import Lookup
from kvkeep.cache.places import Places
from kvkeep.cache.receipts import CacheStats, DropReceipt, VerifyReport
from kvkeep.cache.sealing import block_entry, seal_spans
from kvkeep.cache.verify import find_problems
from kvkeep.planning import Coverage, StoredBlock, coverage_of
from kvkeep.policies import make_policy
from kvkeep.spec import BlockId, KVSpec, LayerKind, Span

__all__ = ["KVCache"]


class KVCache:
    """Who holds which block of every KV group, what each holds, and what a request still needs.

    Blocks are counted by class, `KVSpec.block_classes`: the first blocks of a group may be one of their own.
    With `below` what has no room here lies in tiers, and comes back from there: then `poll` is to be called
    between steps.
    """

    def __init__(
        self,
        spec: KVSpec,
        class_num_blocks: Sequence[int],
        store: BlockStore,
        *,
        policy: str = "lru",
        below: Hierarchy | None = None,
    ) -> None:
        self.spec = spec
        self._below = below
        pools = [
            BlockPool(num_blocks, make_policy(policy))
            for _, num_blocks in zip(spec.block_classes, class_num_blocks, strict=True)
        ]
        firsts = dict(zip(spec.first_block_groups, pools[len(spec.groups) :], strict=True))
        self._pools = pools
        self._ledgers = [
            BlockLedger(
                group,
                pools[at],
                firsts.get(at),
                on_evict=None if below is None else partial(below.before_eviction, at),
            )
            for at, group in enumerate(spec.groups)
        ]
        self._places = Places(spec, self._ledgers, store)
        self._store = store
        if below is not None:
            below.attach(self._places)
        self._leases: set[Lease] = set()
        self._reused_tokens = 0
        self._computed_tokens = 0

    # --- questions -------------------------------------------------------------------------------

    def coverage(self, chain: TokenChain) -> Coverage:
        """What is known of `chain`, as runs; asks tiers behind wires and waits for them. Changes nothing."""
        if not len(chain):
            return Coverage(0, ())
        lookup = (
            None if self._below is None else self._below.lookups.ask(self._below.stored_keys(chain))
        )
        request = self._plan(chain, lookup=lookup)
        size = self.spec.block_size
        return coverage_of(len(chain), size, request.coverage, request.group_blocks)

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

    def reserve(
        self,
        chain: TokenChain,
        *,
        read: bool = True,
        write: bool = True,
        lookup: Lookup | None = None,
    ) -> Lease | None:
        """Hold what is known of `chain` (at least one token) for a request.

        With `read=False` nothing is shared; with `write=False` nothing will be published. What lies in tiers
        begins to load; of tiers behind wires that is what `lookup` has found. Returns None, and forgets
        nothing, when there is no room even for what must be copied or loaded to begin. A request alone in the
        cache always begins, if need be without sharing.
        """
        assert len(chain) > 0
        assert chain.block_size == self.spec.block_size
        request = self._decide(chain, self._plan(chain, read=read, lookup=lookup))
        plan, size = request.coverage, self.spec.block_size
        tables = [BlockTable() for _ in self._ledgers]
        lease = Lease(chain, tables, plan.gaps, publishes=write, close=self._close)
        lease.decision = request.decision
        self._leases.add(lease)
        group_to_loads: list[list[int]] = []
        for group, table in enumerate(tables):
            known = request.group_blocks[group].blocks
            here = [at for at in plan.shared[group] if not isinstance(known[at], StoredBlock)]
            self._places.share(table, here, known, group)
            lease.reused[group] = set(table.held())
            loads = plan.loads(group, known, size)
            table.read_only = plan.shared_inside_gaps(group, size).intersection([*here, *loads])
            group_to_loads.append(loads)
        if not self._places.begin(lease, plan.partial, group_to_loads):
            lease.release()
            # Alone, a request has no room because of what it would itself share.
            is_alone = read and not self._leases
            return self.reserve(chain, read=False, write=write) if is_alone else None
        if self._below is not None:
            self._begin_loads(lease, request, group_to_loads)
        self._reused_tokens += lease.reused_tokens
        return lease

    def extend(self, lease: Lease, spans: Sequence[Span]) -> bool:
        """Give the lease private blocks wherever `spans`, the front of its gaps, will write.

        Returns False, and changes nothing, when there is no room. Blocks shared for later gaps take
        room too: a lease that is alone and has none is to be released, and reserved without `read`.
        """
        missing = [
            self._places.missing_blocks(lease, group, spans) for group in range(len(self._ledgers))
        ]
        for numbers, ledger in zip(missing, self._ledgers, strict=True):
            if not ledger.pool.has_room(len(numbers), with_first=0 in numbers):
                return False
        for group, numbers in enumerate(missing):
            if numbers:
                self._places.allocate_into(lease, group, numbers)
        for group in lease.states:
            self._places.load_state(lease, group, spans)
        return True

    def commit(self, lease: Lease, spans: Sequence[Span]) -> None:
        """Publish what a step has computed; let go of what no later step of the request reads."""
        self._computed_tokens += sum(len(span) for span in spans)
        lease.advance(spans)
        if lease.decision is not None and not lease.loads and not lease.gaps:
            assert self._below is not None
            self._below.finish(lease.decision)
            lease.decision = None
        for group, ledger in enumerate(self._ledgers):
            if lease.publishes:
                if ledger.spec.kind is LayerKind.RECURRENT:
                    self._places.keep_state(lease, group, spans[-1].stop)
                else:
                    seal_spans(ledger, lease.chain, lease.tables[group], spans)
            if ledger.spec.window is not None:
                passed = self._places.release_passed(lease, group)
                if self._below is not None:
                    self._below.note_released(group, passed, lease)

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
            self._places.release(group, table.cut(num_tokens // size, num_kept))
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
        if not self._places.begin(child, None, [()] * len(self._ledgers)):
            child.release()
            return None
        for group, state in lease.states.items():
            self._store.copy_block(group, state, child.states[group])
        return child

    # --- below the device ------------------------------------------------------------------------

    def look_up(self, chain: TokenChain) -> Lookup | None:
        """Begin to ask the tiers behind wires for what is missing; None where there are no tiers."""
        if self._below is None:
            return None
        keys = self._below.stored_keys(chain) if self._below.stack.distant else []
        return self._below.lookups.begin(keys)

    def avoid_failed(self, lease: Lease, lookup: Lookup | None) -> None:
        """Let the next `reserve` with `lookup` compute what failed to load for `lease`."""
        if lookup is not None:
            lookup.avoided.update(
                stored_key(lease.chain.keys[load.number], load.group) for load in lease.failed
            )

    def is_awaited(self, chain: TokenChain, lookup: Lookup | None) -> bool:
        """Whether a request for `chain` does well to wait for an answer, or for a load of another one."""
        if self._below is None:
            return False
        is_asking = lookup is not None and not self._below.lookups.is_ready(lookup)
        return is_asking or self._below.is_loading(chain)

    def poll(self, *, is_busy: bool = False) -> None:
        """Take in what has moved and begin what may move now, the slower when requests run."""
        if self._below is not None:
            self._below.poll(is_busy=is_busy)

    @property
    def is_moving(self) -> bool:
        """Whether a move or an answer of a tier is under way."""
        below = self._below
        return below is not None and bool(below.num_moves or below.lookups.num_under_way)

    def wait(self, timeout_s: float) -> bool:
        """Wait for what is under way; False when there is nothing, or nothing comes in time."""
        return self._below is not None and self.is_moving and self._below.wait(timeout_s)

    def offload(self) -> int:
        """Move what no request uses down now, as far as tiers take it; the blocks that left the device."""
        if self._below is None:
            return 0
        num_before = sum(ledger.num_sealed for ledger in self._ledgers)
        self._below.offload()
        return num_before - sum(ledger.num_sealed for ledger in self._ledgers)

    def close(self) -> None:
        """Write what is to survive to the tiers that outlive the process, and close them all."""
        if self._below is not None:
            self._below.close()

    def block_bytes(self, payloads: PayloadStore) -> BlockBytes:
        """Payloads of blocks, one at a time, for export and import."""
        return BlockBytes(self.spec, self._places, self._below, payloads)

    # --- administration --------------------------------------------------------------------------

    def drop(self, chain: TokenChain, blocks: Iterable[int]) -> DropReceipt:
        """Forget the given full blocks of `chain`, by number, in every group and every tier."""
        keys = [chain.keys[block] for block in sorted(set(blocks))]
        found = [
            [block for key in keys if (block := ledger.get(key)) is not None]
            for ledger in self._ledgers
        ]
        receipt = self._forget(found)
        if self._below is None:
            return receipt
        groups = range(len(self._ledgers))
        stored = self._below.delete([stored_key(key, group) for key in keys for group in groups])
        return replace(receipt, stored=stored)

    def clear(self, *, tiers: bool = False) -> DropReceipt:
        """Forget all content of the device, and of the tiers if they are meant.

        Running requests keep their blocks as private ones.
        """
        receipt = self._forget([ledger.sealed_blocks() for ledger in self._ledgers])
        if self._below is None or not tiers:
            return receipt
        return replace(receipt, stored=self._below.clear())

    def verify(self, *, tiers: bool = False) -> VerifyReport:
        """Check every invariant of pools, indexes and leases, and all objects of `tiers`. Changes nothing."""
        below = self._below
        holds = [] if below is None else below.loads.holds()
        problems = find_problems(self._ledgers, self._leases, holds)
        num_checked = sum(self.num_blocks())
        for report in below.audit() if below is not None and tiers else []:
            num_checked += report.num_objects
            problems += [f"{one.key.hex()} in a tier: {one.reason}" for one in report.wrong]
        return VerifyReport(blocks_checked=num_checked, problems=tuple(problems))

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free, on the device and in every tier."""
        below = self._below
        return replace(
            count_blocks(self.spec, self._pools, num_leases=len(self._leases)),
            reused_tokens=self._reused_tokens,
            computed_tokens=self._computed_tokens,
            tiers=() if below is None else below.stats(),
            planner=None if below is None else below.planner_stats,
        )

    # --- parts -----------------------------------------------------------------------------------

    def _plan(
        self, chain: TokenChain, *, read: bool = True, lookup: Lookup | None = None
    ) -> RequestPlan:
        below = self._below
        find_below = None if below is None else partial(below.find, lookup=lookup)
        return plan_request(self.spec, self._ledgers, chain, read=read, find_below=find_below)

    def _decide(self, chain: TokenChain, request: RequestPlan) -> RequestPlan:
        """The request with what is quicker computed than loaded as gaps."""
        if self._below is None:
            return request
        decision = self._below.choose(len(chain), request, num_others=len(self._leases))
        if decision is not None and decision.computed:
            request = without_loads(self.spec, len(chain), request, decision.computed)
        return replace(request, decision=decision)

    def _begin_loads(
        self, lease: Lease, request: RequestPlan, group_to_loads: Sequence[Sequence[int]]
    ) -> None:
        for group, numbers in enumerate(group_to_loads):
            known = request.group_blocks[group].blocks
            for number in numbers:
                source = known[number]
                assert self._below is not None
                assert isinstance(source, StoredBlock)
                entry = block_entry(lease.chain, number)
                self._below.loads.begin(lease, group, number, entry, source)

    def _close(self, lease: Lease) -> None:
        self._leases.remove(lease)
        if self._below is not None:
            self._below.loads.forget(lease)
        for group, table in enumerate(lease.tables):
            held = table.held()
            self._places.release(group, held)
            if self._below is not None:
                self._below.note_released(group, held, lease)
        for group, state in lease.states.items():
            self._places.release(group, [state])

    def _forget(self, group_blocks: Sequence[Sequence[BlockId]]) -> DropReceipt:
        num_held = num_bytes = 0
        for group, blocks in enumerate(group_blocks):
            if self._below is not None:
                self._below.before_forgetting(group, blocks)
            freed = self._places.forget(group, blocks)
            num_held += len(blocks) - len(freed)
            num_bytes += self._ledgers[group].num_bytes(blocks, self.spec.block_size)
        return DropReceipt(
            num_blocks=sum(len(blocks) for blocks in group_blocks),
            num_bytes=num_bytes,
            num_held=num_held,
        )
