"""Orders about what the cache holds, and their counted answers: forget, keep, end, list, check."""

from collections.abc import Collection, Iterable
from dataclasses import replace

from kvkeep.blocks import TokenChain, stored_key
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.inspection import Inspection
from kvkeep.cache.lease import Lease
from kvkeep.cache.lifetimes import (
    BlockReport,
    Listener,
    PinId,
    PinReport,
    PurgeReceipt,
    Query,
    SessionId,
    SessionReport,
    match,
)
from kvkeep.cache.places import Places
from kvkeep.cache.purges import Purges
from kvkeep.cache.quotas import Share
from kvkeep.cache.receipts import DropReceipt, VerifyReport
from kvkeep.cache.slices import to_end
from kvkeep.cache.upkeep import Upkeep
from kvkeep.cache.verify import find_problems
from kvkeep.errors import PinCapacityError, RequestError
from kvkeep.planning import DEVICE
from kvkeep.spec import BlockKey

__all__ = ["Administration"]


class Administration:
    """Everything that is done to a cache besides serving requests; made and owned by a KVCache."""

    def __init__(
        self,
        places: Places,
        upkeep: Upkeep,
        below: Hierarchy | None,
        leases: Collection[Lease],
    ) -> None:
        self._places = places
        self._ledgers = places.ledgers
        self._groups = range(len(places.ledgers))
        self._upkeep = upkeep
        self._lifetimes = upkeep.lifetimes
        self._below = below
        self._leases = leases
        self.purges = Purges(upkeep, below, leases)
        self.inspection = Inspection(places, upkeep.lifetimes, upkeep.holds, below)

    def tell(self, listener: Listener | None) -> None:
        """Have somebody told of blocks that are not known any more, and of who is to be forgotten."""
        self._lifetimes.listener = listener

    # --- forgetting ------------------------------------------------------------------------------

    def drop(self, chain: TokenChain, blocks: Iterable[int]) -> DropReceipt:
        """Forget the given full blocks of `chain`, by number, in every group and every tier."""
        keys = [chain.keys[block] for block in sorted(set(blocks))]
        forgotten = self._upkeep.forgetting.at_once(keys, "invalidated", (DEVICE,))
        self._lifetimes.tell_gone([key for key in keys if key not in forgotten.keys], "invalidated")
        self._forget_labels(keys)
        stored = {}
        if self._below is not None:
            stored = self._below.delete(
                [stored_key(key, group) for key in keys for group in self._groups]
            )
        return DropReceipt(
            num_blocks=forgotten.num_places,
            num_bytes=forgotten.num_device_bytes,
            num_held=forgotten.num_held_places,
            stored=stored,
        )

    def clear(self, *, tiers: bool = False) -> DropReceipt:
        """Forget all content of the device, and of the tiers if they are meant.

        Running requests keep their blocks as private ones.
        """
        keys = {
            ledger.entry_of(block).key
            for ledger in self._ledgers
            for block in ledger.sealed_blocks()
        }
        forgotten = self._upkeep.forgetting.at_once(keys, "invalidated", (DEVICE,))
        receipt = DropReceipt(
            num_blocks=forgotten.num_places,
            num_bytes=forgotten.num_device_bytes,
            num_held=forgotten.num_held_places,
        )
        if self._below is not None and tiers:
            self.purges.wait_until_restored()
            receipt = replace(receipt, stored=self._below.clear())
            keys = set(self._lifetimes.register)
        self._forget_labels([key for key in keys if not self._upkeep.is_somewhere(key)])
        return receipt

    # --- sessions --------------------------------------------------------------------------------

    def close_session(self, session_id: SessionId) -> PurgeReceipt:
        """End a session: blocks that only it uses are forgotten everywhere, its requests publish nothing."""
        self.purges.wait_until_restored()
        return self.purges.close_session(session_id).wait()

    def fork_session(self, parent: SessionId, child: SessionId) -> None:
        """Begin `child` as a user of all that `parent` uses. Raises RequestError without such a parent."""
        self.session(parent)
        self._upkeep.apply(self._lifetimes.fork_session(parent, child))

    def change_session(self, session_id: SessionId, ttl_s: float) -> SessionReport:
        """Let a session end so long after its last use, of which this is one.

        Only this process knows of it. Raises RequestError where there is no session of that name.
        """
        self.session(session_id)
        session = self._lifetimes.sessions.get(session_id)
        assert session is not None
        self._lifetimes.sessions.set_ttl(session, ttl_s, self._lifetimes.clock())
        return self.session(session_id)

    def sessions(self) -> list[SessionReport]:
        """All sessions, the longest unused first."""
        self.purges.wait_until_restored()
        return to_end(self.inspection.sessions())

    def session(self, session_id: SessionId) -> SessionReport:
        """One session. Raises RequestError where there is none of that name."""
        session = self._lifetimes.sessions.get(session_id)
        if session is None:
            raise RequestError(f"session={session_id.name!r} is not known; sessions() lists all")
        return self.inspection.session(session)

    # --- pins ------------------------------------------------------------------------------------

    def check_pin_room(self, namespace: BlockKey, keys: Collection[BlockKey]) -> None:
        """Raise PinCapacityError where pinning these would keep more than pins may.

        Of the device, of a tier, or of what the tenant's quotas let it have at all.
        """
        register = self._lifetimes.register
        pinned: set[BlockKey] = set()
        for pin in self._lifetimes.pins:
            for _, own in register.pinned(pin):
                pinned |= set(own)
        self._upkeep.quotas.check_pins(namespace, keys)
        num_wanted, most = len(pinned.union(keys)), self._upkeep.holds.most_blocks
        if num_wanted > most:
            raise PinCapacityError(
                f"pins would keep {num_wanted} blocks, and may keep {most} (pin_share="
                f"{self._lifetimes.settings.pin_share:g} of the device); unpin something, or raise pin_share"
            )
        if self._below is not None:
            self._below.holds.check_room(pinned.union(keys))

    def pin(self, pin: PinId, chain: TokenChain) -> PinReport:
        """Keep the known full blocks of a chain until `unpin`.

        Raises PinCapacityError where pins would keep more than they may, RequestError where nothing is known.
        """
        self.purges.wait_until_restored()
        dead = self._lifetimes.register.dead(chain.keys, self._lifetimes.clock())
        known = [key for key in chain.keys if key not in dead and self._upkeep.is_somewhere(key)]
        if not known:
            raise RequestError(
                f"pin={pin!r} means {len(chain)} tokens, of which no block is cached; warm first"
            )
        self.check_pin_room(chain.root, known)
        unlabelled = [key for key in known if self._lifetimes.register.get(key) is None]
        for key in unlabelled:
            self._upkeep.apply(self._lifetimes.enter(key, chain.root))
        self._upkeep.apply(self._lifetimes.pin(pin, chain.root, known))
        return self.inspection.pin(pin, chain.root)

    def unpin(self, pin: PinId) -> PinReport:
        """End a pin; what nobody else pins or uses is forgotten. Raises RequestError for an unknown pin."""
        self.purges.wait_until_restored()
        if not self._lifetimes.has_pin(pin):
            raise RequestError(f"pin={pin!r} is not known; pins() lists all")
        report = self.inspection.pin(pin, self._lifetimes.pins[pin])
        changes = self._lifetimes.unpin(pin)
        self._upkeep.apply(changes)
        orphans = [key for change in changes if change.new.is_orphaned for key in change.keys]
        if orphans:
            self._upkeep.forgetting.begin_keys(orphans, "invalidated")
        return report

    def pins(self) -> list[PinReport]:
        """All pins, by name."""
        self.purges.wait_until_restored()
        return to_end(self.inspection.pins())

    # --- quotas and lists ------------------------------------------------------------------------

    def set_quota(self, share: Share, limit_bytes: int | None) -> None:
        """Limit what a tenant's blocks take; None for no limit.

        Raises RequestError for a place that cannot be limited.
        """
        self._upkeep.quotas.set(share, limit_bytes)
        self._upkeep.keep_quotas(share.namespace)

    def used_bytes(self, share: Share) -> int:
        """What a tenant's blocks take."""
        return self._upkeep.quotas.used_bytes(share)

    def blocks(
        self, query: Query, *, limit: int = 100, after: BlockKey | None = None
    ) -> list[BlockReport]:
        """Blocks that a query means, pinned ones too, the last used first; from behind `after`."""
        self.purges.wait_until_restored()
        register = self._lifetimes.register
        keys = sorted(
            match(replace(query, include_pinned=True), register, self._lifetimes.clock()).keys,
            key=lambda key: (-(register.used_at(key) or 0.0), key),
        )
        start = keys.index(after) + 1 if after in keys else 0
        return self.inspection.reports(keys[start : start + limit])

    # --- checks ----------------------------------------------------------------------------------

    def verify(self, *, tiers: bool = False) -> VerifyReport:
        """Check every invariant of pools, indexes and leases, and all objects of `tiers`. Changes nothing."""
        below = self._below
        holds = [*self._upkeep.holds.places(), *([] if below is None else below.loads.holds())]
        problems = find_problems(self._ledgers, self._leases, holds)
        register = self._lifetimes.register
        problems += [f"labels: {one}" for one in register.check()]
        for ledger in self._ledgers:
            keys = [ledger.entry_of(block).key for block in ledger.sealed_blocks()]
            if any(key not in register for key in keys):
                problems.append(f"group {ledger.spec.name}: a sealed block has no labels")
        num_checked = sum(ledger.pool.num_blocks for ledger in self._ledgers)
        books = VerifyReport(blocks_checked=num_checked, problems=tuple(problems))
        return books + to_end(self.inspection.audit()) if tiers else books

    def _forget_labels(self, keys: Collection[BlockKey]) -> None:
        self._lifetimes.register.forget(keys)
        if self._below is not None:
            self._below.relabels.forget(keys)
