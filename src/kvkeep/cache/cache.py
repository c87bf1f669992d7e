"""The KV cache as one object: coverage, reserve, commit, release, fork, drop, verify, stats.

Bookkeeping only: the bytes are in a BlockStore (the arena), told here which place to copy to which.
Nothing is visible before its bytes are: a block gets its key in `commit`, after the step that wrote.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from kvkeep.blocks import BlockLedger, BlockPool, TokenChain, stored_key
from kvkeep.cache.administration import Administration
from kvkeep.cache.base import BlockStore, PayloadStore
from kvkeep.cache.block_bytes import BlockBytes
from kvkeep.cache.counting import blocks_needed, count_blocks
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.lifetimes import Claim, Lifetimes
from kvkeep.cache.lookup import RequestPlan, plan_request, without_loads
from kvkeep.cache.lookups import Lookup
from kvkeep.cache.places import Places
from kvkeep.cache.receipts import CacheStats, DropReceipt, VerifyReport
from kvkeep.cache.sealing import seal_spans, sealed_numbers
from kvkeep.cache.upkeep import Upkeep, forget_evicted
from kvkeep.config import CacheOptions
from kvkeep.planning import Coverage, StoredBlock, coverage_of
from kvkeep.policies import make_policy
from kvkeep.spec import KVSpec, LayerKind, Span

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
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.spec = spec
        self._below = below
        pools = [
            BlockPool(num_blocks, make_policy(policy))
            for _, num_blocks in zip(spec.block_classes, class_num_blocks, strict=True)
        ]
        firsts = dict(zip(spec.first_block_groups, pools[len(spec.groups) :], strict=True))
        self._pools = pools
        self.lifetimes = lifetimes or Lifetimes()
        self._ledgers: list[BlockLedger] = []
        forget = partial(forget_evicted, self.lifetimes, self._ledgers)
        on_evict = forget if below is None else below.before_eviction
        for at, group in enumerate(spec.groups):
            ledger = BlockLedger(group, pools[at], firsts.get(at), on_evict=partial(on_evict, at))
            self._ledgers.append(ledger)
        self._places = Places(spec, self._ledgers, store)
        self._store = store
        if below is not None:
            below.attach(self._places)
        self._upkeep = Upkeep(self.lifetimes, self._places, below)
        self._leases: set[Lease] = set()
        leases = self._leases
        self.administration = Administration(self._places, self._upkeep, below, leases)
        self._reused_tokens = 0
        self._computed_tokens = 0

    # --- questions -------------------------------------------------------------------------------

    def coverage(self, chain: TokenChain) -> Coverage:
        """What is known of `chain`, as runs; asks tiers behind wires and waits for them. Changes nothing."""
        if not len(chain):
            return Coverage(0, ())
        below = self._below
        lookup = None if below is None else below.lookups.ask(below.stored_keys(chain))
        request, size = self._plan(chain, lookup=lookup), self.spec.block_size
        return coverage_of(len(chain), size, request.coverage, request.group_blocks)

    def gaps(self, chain: TokenChain) -> tuple[Span, ...]:
        """What a request for `chain` would compute, the last token included. Changes nothing."""
        return self._plan(chain).coverage.gaps if len(chain) else ()

    def blocks_needed(self, num_tokens: int, span_tokens: int) -> list[int]:
        """For each class, the blocks that a request holds at its longest, `span_tokens` a step."""
        return blocks_needed(self.spec, num_tokens, span_tokens)

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
        claim: Claim | None = None,
    ) -> Lease | None:
        """Hold what is known of `chain` (at least one token) for a request.

        With `read=False` nothing is shared; with `write=False` nothing will be published. What lies in tiers
        begins to load; of tiers behind wires that is what `lookup` has found. `claim` is what the request
        puts on all that it uses and publishes; None asks for nothing. Returns None, and forgets nothing, when
        there is no room even for what must be copied or loaded to begin. A request alone in the cache always
        begins, if need be without sharing.
        """
        assert len(chain) > 0
        assert chain.block_size == self.spec.block_size
        request = self._decide(chain, self._plan(chain, read=read, lookup=lookup))
        plan, size = request.coverage, self.spec.block_size
        lease = self._open(chain, request, claim, publishes=write)
        group_to_loads, shared = list[list[int]](), list[list[int]]()
        for group, table in enumerate(lease.tables):
            known = request.group_blocks[group].blocks
            here = [at for at in plan.shared[group] if not isinstance(known[at], StoredBlock)]
            self._places.share(table, here, known, group)
            lease.reused[group] = set(table.held())
            loads = plan.loads(group, known, size)
            table.read_only = plan.shared_inside_gaps(group, size).intersection([*here, *loads])
            group_to_loads.append(loads)
            shared.append(here)
        if not self._places.begin(lease, plan.partial, group_to_loads):
            lease.release()
            # Alone, a request has no room because of what it would itself share.
            is_alone = read and not self._leases
            return self.reserve(chain, read=False, write=write, claim=claim) if is_alone else None
        if self._below is not None:
            self._below.loads.begin_all(lease, request.group_blocks, group_to_loads)
        self._reused_tokens += lease.reused_tokens
        self._upkeep.use(lease.claim, chain, _union(shared), is_new=False)
        self._upkeep.begin(lease.claim, chain)
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

    def extend_over_pins(self, lease: Lease, spans: Sequence[Span]) -> bool:
        """The same for a lease that is alone: it takes the places of as many pinned blocks as it lacks."""
        let_go = self._upkeep.holds.make_room(lease, spans)
        has_room = self.extend(lease, spans)
        self._upkeep.holds.hold(let_go)
        return has_room

    def commit(self, lease: Lease, spans: Sequence[Span]) -> None:
        """Publish what a step has computed; let go of what no later step of the request reads."""
        self._computed_tokens += sum(len(span) for span in spans)
        lease.advance(spans)
        if lease.decision is not None and not lease.loads and not lease.gaps:
            assert self._below is not None
            self._below.finish(lease.decision)
            lease.decision = None
        if lease.publishes:
            self._publish(lease, spans)
        for group, ledger in enumerate(self._ledgers):
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
            claim=lease.claim,
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
        """Take in what has moved, begin what may move now, the slower when requests run, and what is due."""
        if self._below is not None:
            self._below.poll(is_busy=is_busy)
        self.administration.purges.poll()
        self._upkeep.poll(is_busy=is_busy)

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
        return 0 if self._below is None else self._below.offload()

    def close(self) -> None:
        """Write what is to survive to the tiers that outlive the process, and close them all."""
        self.administration.purges.close()
        if self._below is not None:
            self._below.close()

    def block_bytes(self, payloads: PayloadStore) -> BlockBytes:
        """Payloads of blocks, one at a time, for export and import."""
        return BlockBytes(self.spec, self._places, self._below, payloads, self._upkeep)

    # --- administration --------------------------------------------------------------------------

    def open_claim(self, options: CacheOptions, chain: TokenChain) -> Claim:
        """What a request puts on its blocks; it is to be closed. Replaced versions of its tags are purged.

        Raises PinCapacityError where it pins more than may be pinned.
        """
        if options.pin and options.publishes and chain.keys:
            self.administration.check_pin_room(chain.root, chain.keys)
        claim = self.lifetimes.open(options, chain)
        self.administration.purges.outdate(claim)
        return claim

    def close_claim(self, claim: Claim, chain: TokenChain | None = None) -> None:
        """The request has ended, with these tokens in all."""
        self.lifetimes.close(claim, chain)
        self._upkeep.keep_quotas(claim.namespace)

    def drop(self, chain: TokenChain, blocks: Iterable[int]) -> DropReceipt:
        """Forget the given full blocks of `chain`, by number, in every group and every tier."""
        return self.administration.drop(chain, blocks)

    def clear(self, *, tiers: bool = False) -> DropReceipt:
        """Forget all content of the device, and of the tiers if they are meant: see Administration."""
        return self.administration.clear(tiers=tiers)

    def verify(self, *, tiers: bool = False) -> VerifyReport:
        """Check every invariant of pools, indexes, labels and leases, and all objects of `tiers`."""
        return self.administration.verify(tiers=tiers)

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free, on the device and in every tier."""
        below = self._below
        return replace(
            count_blocks(self.spec, self._pools, num_leases=len(self._leases)),
            reused_tokens=self._reused_tokens,
            computed_tokens=self._computed_tokens,
            tiers=() if below is None else below.stats(),
            copies=None if below is None else below.copies.report,
            planner=None if below is None else below.planner_stats,
        )

    # --- parts -----------------------------------------------------------------------------------

    def _plan(
        self, chain: TokenChain, *, read: bool = True, lookup: Lookup | None = None
    ) -> RequestPlan:
        below = self._below
        find_below = None if below is None else partial(below.find, lookup=lookup)
        find_dead = partial(self.lifetimes.register.dead, now_s=self.lifetimes.clock())
        return plan_request(
            self.spec, self._ledgers, chain, read=read, find_dead=find_dead, find_below=find_below
        )

    def _decide(self, chain: TokenChain, request: RequestPlan) -> RequestPlan:
        """The request with what is quicker computed than loaded as gaps."""
        if self._below is None:
            return request
        decision = self._below.choose(len(chain), request, num_others=len(self._leases))
        if decision is not None and decision.computed:
            request = without_loads(self.spec, len(chain), request, decision.computed)
        return replace(request, decision=decision)

    def _open(
        self, chain: TokenChain, request: RequestPlan, claim: Claim | None, *, publishes: bool
    ) -> Lease:
        lease = Lease(
            chain,
            [BlockTable() for _ in self._ledgers],
            request.coverage.gaps,
            publishes=publishes,
            claim=claim or self.lifetimes.plain(chain.root),
            close=self._close,
        )
        lease.owns_claim = claim is None
        lease.decision = request.decision
        self._leases.add(lease)
        return lease

    def _close(self, lease: Lease) -> None:
        self._leases.remove(lease)
        self._upkeep.renew(lease)
        if lease.owns_claim:
            self.lifetimes.close(lease.claim)
        if self._below is not None:
            self._below.loads.forget(lease)
        for group, table in enumerate(lease.tables):
            held = table.held()
            self._places.release(group, held)
            if self._below is not None:
                self._below.note_released(group, held, lease)
        for group, state in lease.states.items():
            self._places.release(group, [state])

    def _publish(self, lease: Lease, spans: Sequence[Span]) -> None:
        for group, ledger in enumerate(self._ledgers):
            if ledger.spec.kind is LayerKind.RECURRENT:
                self._places.keep_state(lease, group, spans[-1].stop)
            else:
                seal_spans(ledger, lease.chain, lease.tables[group], spans)
        numbers = sealed_numbers(self.spec, spans)
        if numbers:
            self._upkeep.use(lease.claim, lease.chain, numbers, is_new=True)


def _union(groups: Sequence[Sequence[int]]) -> Sequence[int]:
    """All numbers of all groups, in order."""
    return groups[0] if len(groups) == 1 else sorted(set().union(*groups))
