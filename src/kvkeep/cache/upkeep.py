"""What labels mean for the places where blocks lie: what goes first, what is held, what has to go.

Between the books of labels and those of places; for the thread that owns both.
"""

from collections.abc import Collection, Sequence

from kvkeep.blocks import BlockLedger, Entry, TokenChain, stored_key
from kvkeep.cache.forgetting import Forgetting
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import Lease
from kvkeep.cache.lifetimes import Change, Claim, Lifetimes
from kvkeep.cache.pin_holds import PinHolds
from kvkeep.cache.places import Places
from kvkeep.cache.quotas import Quotas
from kvkeep.cache.stored_labels import StoredLabels
from kvkeep.planning import DEVICE
from kvkeep.policies import DEFAULT_RANK, FIRST_RANK
from kvkeep.spec import BlockId, BlockKey, StoredKey

__all__ = ["Upkeep", "forget_evicted"]

# Labels of blocks that lie nowhere any more are looked for beyond this many, so many in one poll.
_FEWEST_PRUNED = 4096
_PRUNED_AT_ONCE = 512


def forget_evicted(
    lifetimes: Lifetimes,
    ledgers: Sequence[BlockLedger],
    group: int,
    _blocks: Sequence[BlockId],
    entries: Sequence[Entry],
) -> None:
    """With no tier below the content of evicted blocks is gone, unless another group has its part still.

    Knows nothing of those who hold the bytes: the ledgers know it, and must not keep memory alive.
    """
    others = [ledger for at, ledger in enumerate(ledgers) if at != group]
    keys = [
        entry.key
        for entry in entries
        if not others or all(ledger.get(entry.key) is None for ledger in others)
    ]
    lifetimes.register.forget(keys)
    lifetimes.tell_gone(keys, "evicted")


class Upkeep:
    """Carries out what labels say; see Lifetimes for what they say."""

    def __init__(self, lifetimes: Lifetimes, places: Places, below: Hierarchy | None) -> None:
        self.lifetimes = lifetimes
        self.holds = PinHolds(places, lifetimes.settings.pin_share)
        self.quotas = Quotas(lifetimes.register, places, below)
        self._places = places
        self._below = below
        # Blocks that go before all others, until somebody uses them again.
        self._first: set[BlockKey] = set()
        self.forgetting = Forgetting(
            lifetimes, places, self.holds, below, self._first.difference_update
        )
        self._prune_at = _FEWEST_PRUNED
        self._unpruned: list[BlockKey] = []
        if below is not None:
            self.stored_labels = StoredLabels(lifetimes, below, self.apply)
            below.copies.may_write = self._may_write
            below.loads.admit = self._admit
            below.loads.on_sealed = self._settle_on_device
            below.loads.on_rejected = lambda key: lifetimes.tell_gone((key,), "corrupt_rejected")

    @property
    def _ledgers(self) -> Sequence[BlockLedger]:
        return self._places.ledgers

    # --- requests --------------------------------------------------------------------------------

    def use(self, claim: Claim, chain: TokenChain, numbers: Sequence[int], *, is_new: bool) -> None:
        """A request uses blocks of its chain; `is_new`: it has just published them."""
        if is_new and self.forgetting.is_walking:
            self._revive([chain.keys[number] for number in numbers])
        changes = self.lifetimes.use(claim, chain, numbers, is_new=is_new)
        self.apply(changes)
        if is_new and self.lifetimes.register.num_marked:
            for number in numbers:
                self._settle_on_device(chain.keys[number])
        if self._first:
            used = self._first.intersection(chain.keys[number] for number in numbers)
            self._first -= used
            for key in used:
                self._rank((key,), self._rank_of(key))

    def begin(self, claim: Claim, chain: TokenChain) -> None:
        """A request begins to run: what its session has turned away from goes first."""
        left = self.lifetimes.begin(claim, chain)
        if left:
            self._first.update(left)
            self._rank(left, FIRST_RANK)
            if self._below is not None:
                self._below.demote_soon(left)

    def enter(self, entry: Entry) -> bytes:
        """A block is brought from outside, as one that nobody asked anything for; its labels as stored."""
        self.apply(self.lifetimes.enter(entry.key, entry.namespace))
        return self.lifetimes.register.encoded(entry.key)

    def keep_quotas(self, namespace: BlockKey) -> None:
        """Forget what a tenant has too much of; what is too much for the device goes down."""
        for share in self.quotas.of(namespace):
            excess = self.quotas.excess(share, self._is_in_use)
            if not excess:
                continue
            if share.place is None or self._below is None:
                self.forgetting.begin_keys(excess, "evicted")
                continue
            if share.place == DEVICE:
                self._demote(self._below, excess)
            self.forgetting.at_once(excess, "evicted", (share.place,))

    def renew(self, lease: Lease) -> None:
        """A request lets go of its blocks."""
        if lease.claim.slides and lease.publishes:
            keys, numbers = lease.chain.keys, set[int]()
            for table in lease.tables:
                numbers.update(at for at, one in enumerate(table.blocks) if one is not None)
            held = [keys[number] for number in sorted(numbers) if number < len(keys)]
            self.apply(self.lifetimes.renew(lease.claim, held))

    def apply(self, changes: Sequence[Change]) -> None:
        """Do what other labels mean for places."""
        for change in changes:
            old, new = change.old, change.new
            if new.priority != (DEFAULT_RANK if old is None else old.priority):
                self._rank(change.keys, new.priority)
            if new.pins and not (old is not None and old.pins):
                self.holds.hold(change.keys)
                if self._below is not None:
                    self._below.holds.hold(change.keys)
                    self._below.write_soon(change.keys)
            elif old is not None and old.pins and not new.pins:
                self.holds.let_go(change.keys)
                if self._below is not None:
                    self._below.holds.let_go(change.keys)
        if self._below is not None:
            self._below.relabels.changed(changes)

    # --- forgetting ------------------------------------------------------------------------------

    def poll(self, *, is_busy: bool) -> None:
        """Go on with what is being forgotten, and with labels of what lies nowhere."""
        self.forgetting.poll(is_busy=is_busy)
        if self._below is not None:
            while self.stored_labels.grown:
                self.keep_quotas(self.stored_labels.grown.pop())
        self.prune()

    def is_dead(self, key: BlockKey) -> bool:
        """Whether nobody may use a block any more, although it may still lie somewhere."""
        return bool(self.lifetimes.register.dead((key,), self.lifetimes.clock()))

    def prune(self) -> None:
        """Forget the labels of some blocks that lie nowhere any more."""
        register = self.lifetimes.register
        if not self._unpruned:
            if len(register) <= self._prune_at:
                return
            self._unpruned = list(register)
        some, self._unpruned = (
            self._unpruned[-_PRUNED_AT_ONCE:],
            self._unpruned[:-_PRUNED_AT_ONCE],
        )
        self._forget_homeless(some, "evicted")
        if not self._unpruned:
            self._prune_at = max(_FEWEST_PRUNED, 2 * len(register))

    def forget_homeless(self, keys: Collection[BlockKey], reason: str) -> None:
        """Forget the labels of those that lie nowhere any more: of the first now, of the rest in slices."""
        some = list(keys)
        self._forget_homeless(some[:_PRUNED_AT_ONCE], reason)
        self._unpruned += some[_PRUNED_AT_ONCE:]

    def is_somewhere(self, key: BlockKey) -> bool:
        """Whether a block lies on the device, in a tier as far as that is known, or on the way between."""
        if any(ledger.get(key) is not None for ledger in self._ledgers):
            return True
        return self._below is not None and any(
            self._below.has(stored_key(key, group)) for group in range(len(self._ledgers))
        )

    # --- parts -----------------------------------------------------------------------------------

    def _forget_homeless(self, keys: Collection[BlockKey], reason: str) -> None:
        register = self.lifetimes.register
        # What is dead goes in its own way, which also takes it out of tiers.
        dead = register.dead(keys, self.lifetimes.clock())
        gone = [
            key
            for key in keys
            if key in register and key not in dead and not self.is_somewhere(key)
        ]
        register.forget(gone)
        self._first.difference_update(gone)
        if self._below is not None:
            self._below.relabels.forget(gone)
        self.lifetimes.tell_gone(gone, reason)

    def _revive(self, keys: Sequence[BlockKey]) -> None:
        """A request has computed these anew, some of them before they were given up."""
        buried = [key for key in keys if self.lifetimes.register.is_buried(key)]
        if buried:
            self.forgetting.revive(buried)
            self._rank(buried, DEFAULT_RANK)

    def _may_write(self, stored: StoredKey) -> bool:
        """Whether an object may go down: not while it is being deleted, nor once it has expired."""
        assert self._below is not None
        key = BlockKey(stored[:-1])
        if self._below.deletions.is_doomed(stored):
            return False
        return not self.is_dead(key)

    def _admit(
        self, entry: Entry, at: int, lease: Lease | None, number: int, labels: bytes
    ) -> str | None:
        """Judge a block that has come from a tier, and let the request that waits for it use it."""
        assert self._below is not None
        if self.lifetimes.register.is_buried(entry.key):
            return "invalidated"
        arrival = self.lifetimes.arrive(entry.key, entry.namespace, labels)
        if arrival.refusal is not None:
            if arrival.is_final:
                self.forgetting.at_once((entry.key,), arrival.refusal)
            return arrival.refusal
        if labels:
            self._below.relabels.note(entry.key, labels, at)
        self.apply(arrival.changes)
        if lease is not None:
            self.use(lease.claim, lease.chain, (number,), is_new=False)
        return None

    def _settle_on_device(self, key: BlockKey) -> None:
        """A block has come to be on the device: it goes as late, and is held, as its labels say."""
        labels = self.lifetimes.register.get(key)
        if labels is None:
            return
        if labels.priority != DEFAULT_RANK:
            self._rank((key,), labels.priority)
        if labels.pins:
            self.holds.hold((key,))

    def _is_in_use(self, key: BlockKey) -> bool:
        return bool(self.forgetting.num_in_use((key,)))

    def _demote(self, below: Hierarchy, keys: Collection[BlockKey]) -> None:
        for group, ledger in enumerate(self._ledgers):
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            below.before_eviction(group, blocks, [ledger.entry_of(block) for block in blocks])

    def _rank_of(self, key: BlockKey) -> int:
        labels = self.lifetimes.register.get(key)
        return DEFAULT_RANK if labels is None else labels.priority

    def _rank(self, keys: Sequence[BlockKey], rank: int) -> None:
        for ledger in self._ledgers:
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            if blocks:
                ledger.pool.rank(blocks, rank)
