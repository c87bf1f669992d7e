"""The device and what lies below it as one: where blocks are, and their way up and down.

Owned by the thread that owns the books; lanes move the bytes, and `poll` takes in what they have done. No
fault of a tier is more than a miss with a cause here.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from time import monotonic

from kvkeep.blocks import BlockLedger, Entry, TokenChain, stored_key
from kvkeep.cache.base import PayloadStore
from kvkeep.cache.choosing import Chooser
from kvkeep.cache.copies import Copies
from kvkeep.cache.decision import Decision
from kvkeep.cache.deletions import Deletion, Deletions
from kvkeep.cache.lease import Lease
from kvkeep.cache.loads import Loaded, Loads
from kvkeep.cache.lookup import RequestPlan
from kvkeep.cache.lookups import Lookup, Lookups
from kvkeep.cache.places import Places
from kvkeep.cache.receipts import TierReport
from kvkeep.cache.relabels import Relabels
from kvkeep.cache.resting import Resting
from kvkeep.cache.tier_holds import TierHolds
from kvkeep.planning import PlannerStats, StoredBlock
from kvkeep.spec import BlockId, BlockKey, KVSpec, StoredKey
from kvkeep.tiers.base import Occasion, Presence
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.stack import TierStack
from kvkeep.tiers.stored_form import header_bytes

__all__ = ["Hierarchy"]

_log = getLogger(__name__)

# Blocks whose fate is decided in one poll, at the most, so that a step is never held up.
_MOST_AT_ONCE = 64
# Blocks that wait to fall from memory to a slower tier; what is beyond is forgotten, and counted.
_MOST_SPILLS = 64
# What is not written within this long when the cache is closed is given up.
_FLUSH_S = 60.0


@dataclass(frozen=True, slots=True)
class _Finished:
    """A block that a request has let go of, or that is pinned, and why it may go down."""

    group: int
    block: BlockId
    key: BlockKey
    occasion: Occasion


class Hierarchy:
    """A TierStack below the ledgers of a KVCache.

    Blocks that nobody used for `idle_s` leave the device; None keeps them. Without a `chooser` all that is
    stored is loaded.
    """

    def __init__(
        self,
        spec: KVSpec,
        payloads: PayloadStore,
        stack: TierStack,
        *,
        idle_s: float | None = None,
        chooser: Chooser | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.spec = spec
        self.chooser = chooser
        self.stack = stack
        self._payloads = payloads
        self._idle_s = idle_s
        self._clock = clock
        self._results = Results()
        self.copies = Copies(spec, payloads, stack, self._results)
        self.deletions = Deletions(stack, self._results)
        self.holds = TierHolds(stack, len(spec.groups), self.object_bytes)
        self.relabels = Relabels(stack, self._results, len(spec.groups), clock)
        # What memory evicts falls to slower tiers beside everything else: a step never waits for these.
        self._spills = Lane("spill", num_threads=1, max_jobs=_MOST_SPILLS)
        stack.defer = self._begin_spill
        self.lookups = Lookups(stack, self._results, clock)
        self._finished: deque[_Finished] = deque()

    def attach(self, places: Places) -> None:
        """Say whose blocks these are: once, by the KVCache."""
        self._places = places
        self._ledgers: Sequence[BlockLedger] = places.ledgers
        self.loads = Loads(
            self.spec, places, self._payloads, self.stack, self._results, clock=self._clock
        )
        self.loads.on_loaded = self._note_loaded
        self._resting = Resting(places, self.copies, self._idle_s, self._clock)

    # --- questions -------------------------------------------------------------------------------

    def find(
        self, group: int, keys: Sequence[BlockKey], lookup: Lookup | None
    ) -> dict[BlockKey, StoredBlock]:
        """Which of a group's keys some tier has; of those behind wires what `lookup` knows."""
        key_to_stored = {key: stored_key(key, group) for key in keys}
        sightings = self.stack.find(list(key_to_stored.values()), self.stack.local)
        found: dict[BlockKey, StoredBlock] = {}
        for key, stored in key_to_stored.items():
            sighting = sightings.get(stored)
            at: int | None = None
            if sighting is not None and sighting.presence is Presence.PRESENT:
                at = sighting.at
            if at is None and lookup is not None:
                at = lookup.found.get(stored)
            is_avoided = lookup is not None and stored in lookup.avoided
            if (
                at is None
                or is_avoided
                or self.loads.holds_key(stored)
                or self.copies.is_cancelled(stored)
                or self.deletions.is_going(at, stored)
            ):
                continue
            found[key] = StoredBlock(at, self.stack.tiers[at].name)
        return found

    def stored_keys(self, chain: TokenChain) -> list[StoredKey]:
        """The names in tiers of a chain's blocks that are not on the device."""
        return [
            stored_key(key, group)
            for group, ledger in enumerate(self._ledgers)
            for key in chain.keys
            if ledger.get(key) is None
        ]

    def has(self, key: StoredKey) -> bool:
        """Whether some tier has the object, or is about to, as far as is known without asking over a wire."""
        return (
            self.copies.is_under_way(key) or self.loads.holds_key(key) or self.copies.has_copy(key)
        )

    def is_loading(self, chain: TokenChain) -> bool:
        """Whether something that a request for `chain` could use is on its way now."""
        if not self.loads.num_under_way:
            return False
        groups = range(len(self.spec.groups))
        return any(
            self.loads.is_loading(stored_key(key, group)) for key in chain.keys for group in groups
        )

    @property
    def num_moves(self) -> int:
        """Loads, copies and deletions under way, labels being written, and what falls from tier to tier."""
        lanes = (self.loads, self.copies, self.deletions, self.relabels)
        return sum(lane.num_under_way for lane in lanes) + self.stack.num_spilling

    def stats(self) -> tuple[TierReport, ...]:
        """What every tier holds, and what came and went."""
        return tuple(
            TierReport(
                tier=tier.stats(),
                num_loaded=counts.num_blocks,
                loaded_bytes=counts.num_bytes,
                load_seconds=counts.seconds,
                load_failures=dict(counts.failures),
            )
            for tier, counts in zip(self.stack.tiers, self.loads.counts, strict=True)
        )

    def choose(self, num_tokens: int, request: RequestPlan, *, num_others: int) -> Decision | None:
        """What of a request's stored blocks to load, and what to compute all the same."""
        if self.chooser is None:
            return None
        object_bytes = list(map(self.object_bytes, range(len(self.spec.groups))))
        queued = {
            tier.name: self.loads.queued_bytes(at) for at, tier in enumerate(self.stack.tiers)
        }
        return self.chooser.choose(num_tokens, request, object_bytes, queued, num_others=num_others)

    def object_bytes(self, group: int) -> int:
        """Bytes of a stored block of a group; first blocks may be others."""
        return header_bytes(self.spec.block_size) + self._payloads.num_bytes(group, BlockId(0))

    def finish(self, decision: Decision) -> None:
        """All that was decided on has been loaded and computed."""
        if self.chooser is not None:
            self.chooser.finish(decision)

    @property
    def planner_stats(self) -> PlannerStats | None:
        """Decisions between loading and computing, and how they turned out; None where all is loaded."""
        return None if self.chooser is None else self.chooser.stats

    # --- what the cache reports --------------------------------------------------------------------

    def note_released(self, group: int, blocks: Sequence[BlockId], lease: Lease) -> None:
        """A request has let go of these, in chain order; a leaf goes down before its parents."""
        ledger = self._ledgers[group]
        for block in reversed(blocks):
            key = ledger.key_of(block)
            if key is None:
                continue
            is_reused = block in lease.reused[group]
            occasion = Occasion.REUSED if is_reused else Occasion.FINISHED
            if self.copies.wants(stored_key(key, group), occasion):
                self._finished.append(_Finished(group, block, key, occasion))
            self._resting.note(group, block, key)

    def write_soon(self, keys: Sequence[BlockKey]) -> None:
        """Write what lies on the device to the tiers that outlive the process, which may end at any time."""
        for group, ledger in enumerate(self._ledgers):
            for key in keys:
                block = ledger.get(key)
                if block is not None:
                    self._finished.append(_Finished(group, block, key, Occasion.CLOSING))

    def before_eviction(
        self, group: int, blocks: Sequence[BlockId], entries: Sequence[Entry]
    ) -> None:
        """The places of these are about to be reused: what is not below yet goes there now."""
        self.copies.leave_alone(group, entries)
        self.copies.demote(group, blocks, entries)

    def before_forgetting(self, group: int, blocks: Sequence[BlockId]) -> None:
        """The content of these is no longer wanted, but a copy may be reading it."""
        ledger = self._ledgers[group]
        self.copies.leave_alone(group, [ledger.entry_of(block) for block in blocks])

    # --- moves -----------------------------------------------------------------------------------

    def poll(self, *, is_busy: bool) -> None:
        """Take in what the lanes have done, and give them more."""
        self.copies.is_busy = self.deletions.is_busy = is_busy
        for finish in self._results.take():
            finish()
        self.loads.give_up_late()
        self._copy_finished()
        self._resting.poll()
        self.relabels.poll(is_busy=is_busy)

    def hand_over(self, finish: Callable[[], None]) -> None:
        """Have something done by the next `poll`; from any thread."""
        self._results.add(finish)

    def wait(self, timeout_s: float) -> bool:
        """Wait until a move or a look-up is done; False if none is in time."""
        return self._results.wait(timeout_s)

    def offload(self) -> int:
        """Treat all that nobody uses as idle, and wait until it has gone down as far as tiers take it.

        Returns the blocks that left the device.
        """
        num_before = sum(ledger.num_sealed for ledger in self._ledgers)
        for group, ledger in enumerate(self._ledgers):
            for block in ledger.sealed_blocks():
                self._resting.demote_soon(group, block)
        while self._resting.has_overdue:
            self.poll(is_busy=False)
            if self.num_moves:
                self.wait(1.0)
        self.settle()
        return num_before - sum(ledger.num_sealed for ledger in self._ledgers)

    def demote_soon(self, keys: Sequence[BlockKey]) -> None:
        """Treat blocks as idle, unless a request holds them: they leave the device beside compute."""
        for group, ledger in enumerate(self._ledgers):
            for key in keys:
                block = ledger.get(key)
                if block is not None:
                    self._resting.demote_soon(group, block)

    def settle(self, timeout_s: float = float("inf")) -> None:
        """Wait until nothing is under way."""
        until_s = self._clock() + timeout_s
        while self.num_moves and self._clock() < until_s:
            self.wait(1.0)
            self.poll(is_busy=False)

    def delete(self, keys: Sequence[StoredKey]) -> dict[str, int]:
        """Forget objects in all tiers; how many there were in each, by its name."""
        self._cancel(keys)
        counts = self.stack.delete(keys)
        return {self.stack.tiers[at].name: count for at, count in counts.items()}

    def begin_delete(self, keys: Sequence[StoredKey]) -> Deletion:
        """Forget objects in all tiers beside compute; from now on nobody finds them."""
        deletion = Deletion()
        self.add_to_deletion(deletion, keys)
        deletion.end_job()
        return deletion

    def add_to_deletion(self, deletion: Deletion, keys: Sequence[StoredKey]) -> None:
        """Forget more objects as part of a deletion that is not closed."""
        self._cancel(keys)
        self.deletions.add(deletion, keys)

    def clear(self) -> dict[str, int]:
        """Forget all objects of all tiers; how many there were in each, by its name."""
        self.settle()
        self.stack.cancel_spills()
        counts: dict[str, int] = {}
        for tier in self.stack.tiers:
            keys = [one.key for one in tier.objects()]
            self.copies.cancel(keys)
            counts[tier.name] = tier.delete(keys)
        return counts

    def flush(self) -> None:
        """Write to the tiers that outlive the process what they do not have, blocks and labels."""
        for group, ledger in enumerate(self._ledgers):
            for block in ledger.sealed_blocks():
                self._insist(partial(self._begin_last, group, block))
        self.relabels.make_all_due()
        self.poll(is_busy=False)
        self.settle(_FLUSH_S)
        if self.num_moves:
            _log.warning("%d blocks were not written before closing", self.num_moves)

    def close(self) -> None:
        """Flush, end the threads, close the tiers."""
        self.flush()
        self.lookups.close()
        self.loads.close()
        self.copies.close()
        self.deletions.close()
        self.relabels.close()
        self._spills.close(timeout_s=_FLUSH_S)
        self.stack.close()

    # --- parts -----------------------------------------------------------------------------------

    def _cancel(self, keys: Sequence[StoredKey]) -> None:
        """What is on its way down, or up, is not to arrive."""
        self.copies.cancel(keys)
        self.loads.cancel(keys)
        self.lookups.forget(keys)

    def _begin_spill(self, job: Callable[[], None]) -> bool:
        def work() -> None:
            try:
                job()
            finally:
                self._results.add(_nothing)

        return self._spills.submit(work)

    def _insist(self, begin: Callable[[], bool]) -> None:
        while not begin():
            if not self.copies.num_under_way:
                return
            self.wait(1.0)
            self.poll(is_busy=False)

    def _begin_last(self, group: int, block: BlockId) -> bool:
        """Whether a block is on its way for good; one that rested may have left meanwhile."""
        ledger = self._ledgers[group]
        key = ledger.key_of(block)
        if key is None or not self.copies.wants(stored_key(key, group), Occasion.CLOSING):
            return True
        entry = ledger.entry_of(block)
        return self.copies.begin(group, block, entry, Occasion.CLOSING, _nothing)

    def _copy_finished(self) -> None:
        for _ in range(min(len(self._finished), _MOST_AT_ONCE)):
            one = self._finished[0]
            ledger = self._ledgers[one.group]
            if ledger.key_of(one.block) == one.key:
                key = stored_key(one.key, one.group)
                entry = ledger.entry_of(one.block)
                if self.copies.wants(key, one.occasion) and not self.copies.begin(
                    one.group, one.block, entry, one.occasion, _nothing
                ):
                    return
            self._finished.popleft()

    def _note_loaded(self, loaded: Loaded) -> None:
        if loaded.at in self.stack.distant:
            self.copies.remember(loaded.key)
        if self.chooser is not None:
            name = self.stack.tiers[loaded.at].name
            self.chooser.observe_load(name, loaded.num_bytes, loaded.seconds, loaded.queued_bytes)


def _nothing() -> None:
    """What follows a copy that was made ahead of time."""
