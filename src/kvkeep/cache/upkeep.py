"""What labels mean for the places where blocks lie: what goes first, what is held, what has to go.

Between the books of labels and those of places; for the thread that owns both.
"""

from collections.abc import Collection, Sequence

from kvkeep.blocks import BlockLedger, Entry, TokenChain, stored_key
from kvkeep.cache.deletions import Deletion
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import Lease
from kvkeep.cache.lifetimes import Change, Claim, Lifetimes
from kvkeep.cache.pin_holds import PinHolds
from kvkeep.cache.places import Places
from kvkeep.cache.quotas import Quotas
from kvkeep.planning import DEVICE
from kvkeep.policies import DEFAULT_RANK, FIRST_RANK
from kvkeep.spec import BlockId, BlockKey, StoredKey

__all__ = ["Forgotten", "Upkeep", "forget_evicted"]

# Labels of blocks that lie nowhere any more are looked for beyond this many, so many in one poll.
_FEWEST_PRUNED = 4096
# So many blocks are given up between two steps, and so many times that while nothing runs.
_FORGOTTEN_AT_ONCE = 1024
_PARTS_WHEN_IDLE = 16
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


class Forgotten:
    """Blocks that nobody finds any more. Their places and objects are given up beside compute, in parts."""

    def __init__(
        self, keys: Collection[BlockKey], reason: str, places: Collection[str] | None
    ) -> None:
        self.keys = keys
        self.reason = reason
        self.places = places
        self.left = list(keys)
        self.num_device_bytes = 0
        self.num_in_use = 0
        self.num_places = self.num_held_places = 0
        # Closed when nothing is left.
        self.deletion = Deletion()

    @property
    def is_done(self) -> bool:
        """Whether nothing of it lies anywhere."""
        return self.deletion.is_done


class Upkeep:
    """Carries out what labels say; see Lifetimes for what they say."""

    def __init__(self, lifetimes: Lifetimes, places: Places, below: Hierarchy | None) -> None:
        self.lifetimes = lifetimes
        self.holds = PinHolds(places, lifetimes.settings.pin_share)
        spec = places.spec
        block_bytes = sum(group.block_bytes(spec.block_size) for group in spec.groups)
        self.quotas = Quotas(lifetimes.register, block_bytes)
        self._places = places
        self._below = below
        # Blocks that go before all others, until somebody uses them again.
        self._first: set[BlockKey] = set()
        # What is being forgotten, in the order in which it began.
        self._begun: list[Forgotten] = []
        self._prune_at = _FEWEST_PRUNED
        self._unpruned: list[BlockKey] = []
        if below is not None:
            register = lifetimes.register
            below.relabels.labels_of = below.copies.labels_of = register.encoded
            below.copies.on_copied = self._note_copied
            below.copies.may_write = self._may_write
            below.loads.admit = self._admit
            below.loads.on_sealed = self._settle_on_device

    @property
    def _ledgers(self) -> Sequence[BlockLedger]:
        return self._places.ledgers

    # --- requests --------------------------------------------------------------------------------

    def use(self, claim: Claim, chain: TokenChain, numbers: Sequence[int], *, is_new: bool) -> None:
        """A request uses blocks of its chain; `is_new`: it has just published them."""
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

    def keep_quota(self, namespace: BlockKey) -> Forgotten | None:
        """Forget what a tenant has too much of."""
        if namespace not in self.quotas.limits:
            return None
        excess = self.quotas.excess(namespace, lambda key: bool(self.num_in_use((key,))))
        return self.forget(excess, "evicted") if excess else None

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
            elif old is not None and old.pins and not new.pins:
                self.holds.let_go(change.keys)
                if self._below is not None:
                    self._below.holds.let_go(change.keys)
        if self._below is not None:
            self._below.relabels.changed(changes)

    # --- forgetting ------------------------------------------------------------------------------

    def forget(
        self,
        keys: Collection[BlockKey],
        reason: str,
        places: Collection[str] | None = None,
    ) -> Forgotten:
        """Forget blocks in `places` ("device", names of tiers; all of them): nobody finds them from now on.

        Many are given up in parts, by `poll`; those of some places only at once.

        Running requests keep what they hold as their own.
        """
        forgotten = Forgotten(keys, reason, places)
        if places is None:
            self.lifetimes.register.doom(keys)
            self._first.difference_update(keys)
            if self._below is not None:
                self._below.relabels.forget(keys)
                self._below.cancel_loads(keys)
        self.lifetimes.tell_gone(keys, reason)
        self._begun.append(forgotten)
        if len(keys) <= _FORGOTTEN_AT_ONCE or places is not None:
            while forgotten.left:
                self._forget_some(forgotten)
        self._close_forgotten()
        return forgotten

    def poll(self, *, is_busy: bool) -> None:
        """Go on with what is being forgotten, and with labels of what lies nowhere."""
        for _ in range(1 if is_busy else _PARTS_WHEN_IDLE):
            if not self._begun:
                break
            self._forget_some(self._begun[0])
            self._close_forgotten()
        self.prune()

    def finish(self) -> None:
        """Give up all that is being forgotten."""
        while self._begun:
            self.poll(is_busy=False)

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
        gone = [key for key in some if key in register and not self.is_somewhere(key)]
        register.forget(gone)
        self._first.difference_update(gone)
        if self._below is not None:
            self._below.relabels.forget(gone)
        self.lifetimes.tell_gone(gone, "evicted")
        if not self._unpruned:
            self._prune_at = max(_FEWEST_PRUNED, 2 * len(register))

    def is_somewhere(self, key: BlockKey) -> bool:
        """Whether a block lies on the device, in a tier as far as that is known, or on the way between."""
        if any(ledger.get(key) is not None for ledger in self._ledgers):
            return True
        return self._below is not None and any(
            self._below.has(stored_key(key, group)) for group in range(len(self._ledgers))
        )

    def num_in_use(self, keys: Collection[BlockKey]) -> int:
        """How many of these blocks requests hold on the device."""
        pinned = self.holds.holders()
        in_use = set()
        for group, ledger in enumerate(self._ledgers):
            for key in keys:
                block = ledger.get(key)
                if block is not None and ledger.pool.num_holders(block) > (
                    (group, block) in pinned
                ):
                    in_use.add(key)
        return len(in_use)

    # --- parts -----------------------------------------------------------------------------------

    def _forget_some(self, forgotten: Forgotten) -> None:
        part = forgotten.left[-_FORGOTTEN_AT_ONCE:]
        del forgotten.left[-_FORGOTTEN_AT_ONCE:]
        register = self.lifetimes.register
        here = part
        if forgotten.places is None:
            # What was computed anew meanwhile is somebody's.
            here = [key for key in part if register.is_doomed(key)]
        if forgotten.places is None or DEVICE in forgotten.places:
            self._forget_here(forgotten, here)
        register.spare(here)
        if self._below is not None:
            among = None
            if forgotten.places is not None:
                tiers = enumerate(self._below.stack.tiers)
                among = [at for at, tier in tiers if tier.name in forgotten.places]
            if among is None or among:
                groups = range(len(self._ledgers))
                stored = [stored_key(key, group) for key in part for group in groups]
                self._below.add_to_deletion(forgotten.deletion, stored, among)

    def _close_forgotten(self) -> None:
        for forgotten in [one for one in self._begun if not one.left]:
            self._begun.remove(forgotten)
            forgotten.deletion.end_job()

    def _forget_here(self, forgotten: Forgotten, keys: Sequence[BlockKey]) -> None:
        if self.holds:
            self.holds.let_go(keys)
        forgotten.num_in_use += self.num_in_use(keys)
        for group, ledger in enumerate(self._ledgers):
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            if not blocks:
                continue
            forgotten.num_device_bytes += ledger.num_bytes(blocks, self._places.spec.block_size)
            if self._below is not None:
                self._below.before_forgetting(group, blocks)
            freed = self._places.forget(group, blocks)
            forgotten.num_places += len(blocks)
            forgotten.num_held_places += len(blocks) - len(freed)

    def _note_copied(self, key: BlockKey, labels: bytes) -> None:
        assert self._below is not None
        self._below.relabels.note(key, labels)
        known = self.lifetimes.register.get(key)
        if known is not None and known.pins:
            self._below.holds.hold((key,))

    def _may_write(self, stored: StoredKey) -> bool:
        """Whether an object may go down: not while it is being deleted, nor once it has expired."""
        assert self._below is not None
        key = BlockKey(stored[:-1])
        if self._below.deletions.is_doomed(stored):
            return False
        return not self.is_dead(key)

    def _admit(self, entry: Entry, lease: Lease | None, number: int, labels: bytes) -> str | None:
        """Judge a block that has come from a tier, and let the request that waits for it use it."""
        assert self._below is not None
        arrival = self.lifetimes.arrive(entry.key, entry.namespace, labels)
        if arrival.refusal is not None:
            if arrival.is_final:
                self.forget((entry.key,), arrival.refusal)
            return arrival.refusal
        if labels:
            self._below.relabels.note(entry.key, labels)
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

    def _rank_of(self, key: BlockKey) -> int:
        labels = self.lifetimes.register.get(key)
        return DEFAULT_RANK if labels is None else labels.priority

    def _rank(self, keys: Sequence[BlockKey], rank: int) -> None:
        for ledger in self._ledgers:
            blocks = [block for key in keys if (block := ledger.get(key)) is not None]
            if blocks:
                ledger.pool.rank(blocks, rank)
