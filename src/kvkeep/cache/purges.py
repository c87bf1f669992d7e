"""Purges and expiries: from what is meant to what is gone, with a receipt that counts it."""

from collections.abc import Callable, Collection
from functools import partial

from kvkeep.blocks import stored_key
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import Lease
from kvkeep.cache.lifetimes import (
    Match,
    PurgeReceipt,
    Query,
    SessionId,
    decode_labels,
    match,
)
from kvkeep.cache.places import Places
from kvkeep.cache.restoring import Restoring, open_journal
from kvkeep.cache.upkeep import Forgotten, Upkeep
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Labelled, Presence

__all__ = ["Purge", "Purges"]


class Purge:
    """A purge that has begun: nothing of it is served any more. Tiers delete beside compute."""

    def __init__(
        self, matched: Match, forgotten: Forgotten, upkeep: Upkeep, below: Hierarchy | None
    ) -> None:
        self._matched = matched
        self._forgotten = forgotten
        self._upkeep = upkeep
        self._below = below

    @property
    def is_done(self) -> bool:
        """Whether all of it is gone everywhere."""
        return self._forgotten.is_done

    def wait(self) -> PurgeReceipt:
        """Wait for the end; for the thread that owns the cache."""
        while not self.is_done:
            self._upkeep.poll(is_busy=False)
            if self._below is not None and not self._forgotten.left:
                self._below.wait(1.0)
                self._below.poll(is_busy=False)
        return self.receipt()

    def receipt(self) -> PurgeReceipt:
        """What was forgotten so far: all of it once the purge is done."""
        forgotten, deletion = self._forgotten, self._forgotten.deletion
        stored: dict[str, int] = {}
        num_bytes, found = forgotten.num_device_bytes, set(forgotten.keys)
        if self._below is not None:
            found |= deletion.found
            for (name, group), count in deletion.num_objects.items():
                stored[name] = stored.get(name, 0) + count
                num_bytes += count * self._below.object_bytes(group)
        return PurgeReceipt(
            matched=len(found) + self._matched.num_pinned,
            deleted=len(found),
            freed_bytes=num_bytes,
            skipped_pinned=self._matched.num_pinned,
            in_use=forgotten.num_in_use,
            stored=stored,
        )


class Purges:
    """Begins purges, and finishes those that a crash interrupted; made by Administration."""

    def __init__(
        self,
        places: Places,
        upkeep: Upkeep,
        below: Hierarchy | None,
        leases: Collection[Lease],
    ) -> None:
        self._places = places
        self._leases = leases
        self._ledgers = places.ledgers
        self._upkeep = upkeep
        self._lifetimes = upkeep.lifetimes
        self._below = below
        self._journal = open_journal(below)
        self._restoring = None if below is None else Restoring(self._lifetimes, below)
        self._resume()

    def wait_until_restored(self) -> None:
        """Wait until the labels of what earlier processes left are known."""
        if self._restoring is not None:
            self._restoring.wait()

    def begin(self, query: Query, *, reason: str = "invalidated", search: bool = True) -> Purge:
        """Forget what a query means, and let requests that it means publish nothing any more.

        With `search` also what tiers have that is not known here, such as blocks of other machines.
        """
        if search:
            self.wait_until_restored()
        now_s = self._lifetimes.clock()
        matched = match(query, self._lifetimes.register, now_s)
        if query.tiers is None:
            self._lifetimes.purged(query)
        purge_id = None
        if self._journal is not None and (search or matched.keys):
            purge_id = self._journal.begin(query, now_s)
        forgotten = self._upkeep.forget(matched.keys, reason, query.tiers)
        if search and self._below is not None and query.used_before is None:
            among = self._among(query)
            self._below.deletions.search(forgotten.deletion, self._fits(query), among)
        if purge_id is not None and self._journal is not None:
            forgotten.deletion.when_done(partial(self._journal.finish, purge_id))
        return Purge(matched, forgotten, self._upkeep, self._below)

    def purge(self, query: Query, *, dry_run: bool = False) -> PurgeReceipt:
        """The same to its end; with `dry_run` nothing is done, and what is known here is counted."""
        return self._count(query) if dry_run else self.begin(query).wait()

    def expire(self) -> PurgeReceipt:
        """Forget what has expired, and end sessions that nobody used for too long."""
        return sum((one.wait() for one in self._sweep()), PurgeReceipt())

    def poll(self) -> None:
        """Begin to forget what ends of itself, as far as it is due."""
        if self._lifetimes.next_due() <= self._lifetimes.clock():
            self._sweep()

    def close_session(self, session_id: SessionId, *, search: bool = True) -> Purge:
        """End a session: what only it uses goes everywhere, and its requests publish nothing any more."""
        query = Query(
            sessions=frozenset((session_id.name,)), namespaces=frozenset((session_id.namespace,))
        )
        purge = self.begin(query, search=search)
        self._upkeep.apply(self._lifetimes.end_session(session_id))
        return purge

    def close(self) -> None:
        """Give up what is still to be forgotten, and end what runs beside."""
        self._upkeep.finish()
        if self._restoring is not None:
            self._restoring.close()

    # --- parts -----------------------------------------------------------------------------------

    def _sweep(self) -> list[Purge]:
        now_s, register = self._lifetimes.clock(), self._lifetimes.register
        if register.next_expiry <= now_s:
            # What a request holds it is using now: that puts off an end that counts from every use.
            for lease in self._leases:
                self._upkeep.renew(lease)
        due = frozenset(register.due(now_s))
        forgotten = self._upkeep.forget(due, "expired")
        purges = [Purge(Match(due, 0), forgotten, self._upkeep, self._below)]
        ended = self._lifetimes.sessions.due(now_s)
        return purges + [self.close_session(one, search=False) for one in ended]

    def _resume(self) -> None:
        """Purges that were interrupted come to their end before anything is served."""
        for one in [] if self._journal is None else self._journal.unfinished():
            self.begin(one.query).wait()
            assert self._journal is not None
            self._journal.finish(one.purge_id)

    def _fits(self, query: Query) -> Callable[[Labelled], bool]:
        """Judges an object by its own labels, unless better ones are known; runs on another thread."""
        register, until = self._lifetimes.register, self._lifetimes.clock()
        until += self._lifetimes.settings.max_clock_skew_s
        means_all = query == Query(include_pinned=query.include_pinned, tiers=query.tiers)

        def fits(one: Labelled) -> bool:
            key = BlockKey(one.key[:-1])
            if key in register:
                return False
            labels = decode_labels(one.labels)
            if labels is None:
                return means_all
            return labels.created_at <= until and query.means(key, labels)

        return fits

    def _among(self, query: Query) -> list[int]:
        assert self._below is not None
        return [
            at
            for at, tier in enumerate(self._below.stack.tiers)
            if query.tiers is None or tier.name in query.tiers
        ]

    def _count(self, query: Query) -> PurgeReceipt:
        """What a purge would forget of what is known here."""
        self.wait_until_restored()
        matched = match(query, self._lifetimes.register, self._lifetimes.clock())
        num_bytes, stored = 0, dict[str, int]()
        if query.tiers is None or "device" in query.tiers:
            for ledger in self._ledgers:
                blocks = [one for key in matched.keys if (one := ledger.get(key)) is not None]
                num_bytes += ledger.num_bytes(blocks, self._places.spec.block_size)
        for at in [] if self._below is None else self._among(query):
            assert self._below is not None
            tier = self._below.stack.tiers[at]
            for group in range(len(self._ledgers)):
                there = tier.find([stored_key(key, group) for key in matched.keys])
                count = there.count(Presence.PRESENT)
                num_bytes += count * self._below.object_bytes(group)
                if count:
                    stored[tier.name] = stored.get(tier.name, 0) + count
        return PurgeReceipt(
            matched=len(matched.keys) + matched.num_pinned,
            deleted=len(matched.keys),
            freed_bytes=num_bytes,
            skipped_pinned=matched.num_pinned,
            in_use=self._upkeep.num_in_use(matched.keys),
            stored=stored,
            dry_run=True,
        )
