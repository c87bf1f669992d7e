"""Purges and expiries: from what is meant to what is gone, with a receipt that counts it."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from math import nextafter

from kvkeep.cache.deletions import Deletion
from kvkeep.cache.forgetting import Forgotten
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import Lease
from kvkeep.cache.lifetimes import Claim, PurgeReceipt, Query, SessionId
from kvkeep.cache.lifetimes.journal import Unfinished
from kvkeep.cache.restoring import Restoring, open_journal
from kvkeep.cache.searches import Found, Search
from kvkeep.cache.slices import Bits, to_end
from kvkeep.cache.upkeep import Upkeep
from kvkeep.spec import BlockKey, StoredKey

__all__ = ["Purge", "Purges", "Reach"]


class Reach(StrEnum):
    """How far a purge looks beyond the blocks that are known here."""

    KNOWN = "known"  # no further
    SOON = (
        "soon"  # at what tiers have, such as blocks of other machines, together with other purges
    )
    NOW = "now"  # the same at once


class Purge:
    """A purge that has begun: nothing of it is served any more. Places are given up beside compute."""

    def __init__(self, forgotten: Forgotten, upkeep: Upkeep, below: Hierarchy | None) -> None:
        self._forgotten = forgotten
        self._upkeep = upkeep
        self._below = below

    @property
    def is_done(self) -> bool:
        """Whether all of it is gone everywhere."""
        return self._forgotten.is_done

    def wait(self) -> PurgeReceipt:
        """Wait for the end; for the thread that owns the cache."""
        self._upkeep.forgetting.finish()
        while not self.is_done:
            assert self._below is not None, "without tiers it is done when nothing is known of it"
            self._below.wait(1.0)
            self._below.poll(is_busy=False)
            self._below.deletions.poll()
        return self.receipt()

    def receipt(self) -> PurgeReceipt:
        """What was forgotten so far: all of it once the purge is done."""
        forgotten, stored = self._forgotten, dict[str, int]()
        num_bytes, num_pinned = forgotten.num_device_bytes, len(forgotten.pinned)
        num_deleted = len(forgotten.keys) + len(forgotten.found - forgotten.keys)
        if self._below is not None:
            for (name, group), count in forgotten.deletion.num_objects.items():
                stored[name] = stored.get(name, 0) + count
                num_bytes += count * self._below.object_bytes(group)
        return PurgeReceipt(
            matched=num_deleted + num_pinned,
            deleted=num_deleted,
            freed_bytes=num_bytes,
            skipped_pinned=num_pinned,
            in_use=forgotten.num_in_use,
            stored=stored,
            not_reached=forgotten.deletion.not_reached,
        )


class Purges:
    """Begins purges, and finishes those that a crash interrupted; made by Administration."""

    def __init__(self, upkeep: Upkeep, below: Hierarchy | None, leases: Collection[Lease]) -> None:
        self._upkeep = upkeep
        self._forgetting = upkeep.forgetting
        self._lifetimes = upkeep.lifetimes
        self._below = below
        self._leases = leases
        self._journal = open_journal(below)
        self._expiring: Forgotten | None = None
        unfinished = [] if self._journal is None else self._journal.unfinished()
        self._restoring = None
        if below is not None:
            self._restoring = Restoring(self._lifetimes, below, ends_purges=bool(unfinished))
        for one in unfinished:
            self._resume(one)
        if unfinished:
            # What they mean in tiers of this machine has gone then; the rest is checked when it comes.
            self.wait_until_restored()

    @property
    def is_restored(self) -> bool:
        """Whether the labels of what earlier processes left are known."""
        return self._restoring is None or self._restoring.is_done

    def wait_until_restored(self) -> None:
        """Wait until the labels of what earlier processes left are known."""
        if self._restoring is not None:
            self._restoring.wait()

    def begin(self, query: Query, *, reach: Reach = Reach.NOW) -> Purge:
        """Forget what a query means, and let requests that it means publish nothing any more.

        From now on nothing of it is served, from whatever place. When blocks were used last is known of those
        that are known here only.
        """
        if query.used_before is not None:
            self.wait_until_restored()
            reach = Reach.KNOWN
        return self._purge(self._begin(query, query, reach))

    def purge(self, query: Query, *, dry_run: bool = False) -> PurgeReceipt:
        """The same to its end; with `dry_run` nothing is done, and what is known here is counted."""
        self.wait_until_restored()
        return to_end(self.planned(query)) if dry_run else self.begin(query).wait()

    def planned(self, query: Query) -> Bits[PurgeReceipt]:
        """What a purge would forget of what is known here."""
        return self._forgetting.planned(query)

    def outdate(self, claim: Claim) -> None:
        """Forget what depends on other versions of what a new request depends on; failing ends its claim."""
        try:
            query = self._lifetimes.outdating(claim)
            if query is not None:
                # What the request itself computes is younger, whenever tiers are looked through.
                until = self._lifetimes.clock() + self._lifetimes.settings.max_clock_skew_s
                elsewhere = replace(query, created_before=nextafter(until, 0.0))
                self._begin(query, elsewhere, Reach.SOON)
        except BaseException:
            self._lifetimes.close(claim)
            raise

    def expire(self) -> PurgeReceipt:
        """Forget what has expired, and end sessions that nobody used for too long."""
        self.wait_until_restored()
        self._forgetting.finish()
        return sum((one.wait() for one in self._sweep()), PurgeReceipt())

    def poll(self) -> None:
        """Begin to forget what ends of itself, as far as it is due, and go on with what waits.

        What other processes purge whose tiers lie in the same folder is forgotten here too.
        """
        for other in () if self._journal is None else self._journal.begun_by_others():
            self._follow(other)
        if self._lifetimes.next_due() <= self._lifetimes.clock():
            self._sweep()
        of_session = self._lifetimes.register.of_session
        self._lifetimes.sessions.prune(lambda one: any(True for _ in of_session(one)))
        if self._below is not None:
            self._below.deletions.poll()

    def close_session(self, session_id: SessionId) -> Purge:
        """End a session: what only it uses goes everywhere, and its requests publish nothing any more."""
        query = _of_session(session_id)
        return self._end_session(session_id, query, Reach.NOW)

    def close(self) -> None:
        """Give up what is still to be forgotten, and end what runs beside."""
        self._forgetting.finish()
        if self._restoring is not None:
            self._restoring.close()
        if self._journal is not None:
            self._journal.close()

    # --- parts -----------------------------------------------------------------------------------

    def _resume(self, unfinished: Unfinished) -> None:
        query, reach = unfinished.query, Reach.NOW
        if query.used_before is not None:
            # When blocks were used last is forgotten: they count as unused.
            self.wait_until_restored()
            reach = Reach.KNOWN
        deletion = self._begin(query, query, reach, unfinished).deletion
        for at, name in enumerate(self._tier_names()):
            assert self._below is not None
            self._below.deletions.add(deletion, unfinished.left.get(name, ()), (at,))

    def _follow(self, other: Unfinished) -> None:
        """Forget what another process purges, which looks itself for what is not known in its tiers."""
        query = other.query
        # Of which tiers it is the other that sees to it, and what was used last here only we know.
        if query.tiers is not None or query.used_before is not None:
            return
        now_s = self._lifetimes.clock()
        self._lifetimes.void(query)
        number = self._lifetimes.purged.begin(query, now_s)
        forgotten = self._forgetting.begin(query, "invalidated")
        own = set(self._tier_names()) - other.tiers if other.tiers else ()
        if own:
            assert self._below is not None
            assert self._journal is not None
            purge_id = self._journal.begin(query, now_s, tiers=own, origin=other)
            self._note(forgotten.deletion, purge_id)
            forgotten.deletion.when_done(partial(self._lifetimes.purged.end, number))
            self._search(self._below, forgotten, query, own, is_urgent=False)
        else:
            self._lifetimes.purged.end(number)

    def _begin(
        self, query: Query, elsewhere: Query, reach: Reach, unfinished: Unfinished | None = None
    ) -> Forgotten:
        """Forget what `query` means of what is known, and what `elsewhere` means of the rest."""
        now_s, names = self._lifetimes.clock(), self._tier_names()
        if query.tiers is not None:
            names = [name for name in names if name in query.tiers]
        else:
            self._lifetimes.void(query)
        purge_id = None if unfinished is None else unfinished.purge_id
        if self._journal is not None and purge_id is None:
            purge_id = self._journal.begin(elsewhere, now_s, tiers=names)
        forgotten = self._forgetting.begin(query, "invalidated")
        deletion = forgotten.deletion
        if query.tiers is not None:
            forget = self._upkeep.forget_homeless
            deletion.when_done(partial(forget, forgotten.meant, "invalidated"))
        if self._below is not None:
            if purge_id is not None:
                # What lies in tiers that this process lacks is for one that has them.
                is_all = unfinished is None or unfinished.is_within(self._tier_names())
                self._note(deletion, purge_id, ends=is_all)
            if query.tiers is None and query.used_before is None:
                number = self._lifetimes.purged.begin(elsewhere, now_s)
                deletion.when_done(partial(self._lifetimes.purged.end, number))
            if reach is not Reach.KNOWN:
                is_urgent = reach is Reach.NOW
                self._search(self._below, forgotten, elsewhere, names, is_urgent=is_urgent)
        return forgotten

    def _note(self, deletion: Deletion, purge_id: str, *, ends: bool = True) -> None:
        """Have the journal follow a purge, to its end if it `ends` here."""
        assert self._journal is not None
        assert self._below is not None
        self._below.deletions.add_job(deletion, self._journal.sync)
        deletion.on_left = partial(self._journal.leave, purge_id)
        if ends:
            deletion.when_done(partial(self._journal.finish, purge_id))

    def _tier_names(self) -> list[str]:
        return [] if self._below is None else [tier.name for tier in self._below.stack.tiers]

    def _purge(self, forgotten: Forgotten) -> Purge:
        return Purge(forgotten, self._upkeep, self._below)

    def _search(
        self,
        below: Hierarchy,
        forgotten: Forgotten,
        query: Query,
        names: Collection[str],
        *,
        is_urgent: bool,
    ) -> None:
        """Look in tiers of these names for what is not known here, and forget it as part of a purge."""
        tiers = below.stack.tiers

        def end(search: Search, missed: Sequence[int]) -> None:
            for at in missed:
                deletion.leave(tiers[at].name)
                searches.add_left(replace(search, among=(at,), on_done=partial(end_left, at)))
            deletion.end_job()

        def end_left(at: int, search: Search, missed: Sequence[int]) -> None:
            if missed:
                searches.add_left(search)
            else:
                deletion.end_left(tiers[at].name)

        deletion, searches = forgotten.deletion, below.deletions.searches
        deletion.begin_job()
        search = Search(
            query=query,
            until=self._lifetimes.clock() + self._lifetimes.settings.max_clock_skew_s,
            among=[at for at, tier in enumerate(tiers) if tier.name in names],
            on_found=partial(self._take, below, forgotten, query),
            on_done=end,
        )
        searches.add(search, is_urgent=is_urgent)

    def _take(self, below: Hierarchy, forgotten: Forgotten, query: Query, found: Found) -> None:
        register = self._lifetimes.register
        stored_to_key = {one: BlockKey(one[:-1]) for one in found.meant}
        # What is purged here is given up without looking.
        rest = [one for one, key in stored_to_key.items() if not self._goes(forgotten, query, key)]
        unknown = [one for one in rest if stored_to_key[one] not in register]
        below.deletions.add_found(forgotten.deletion, unknown, found.at, forgotten.note_found)
        # What lives here under labels that are not meant stays here.
        others = [one for one in rest if self._is_meant_there(below, query, found, one)]
        below.deletions.add_found(forgotten.deletion, others, found.at, below.copies.unremember)
        forgotten.pinned.update(one for one in found.pinned if one not in register)

    def _goes(self, forgotten: Forgotten, query: Query, key: BlockKey) -> bool:
        if key in forgotten.keys or self._lifetimes.register.is_buried(key):
            return True
        labels = None if query.tiers is None else self._lifetimes.register.get(key)
        return labels is not None and query.means(key, labels)

    def _is_meant_there(
        self, below: Hierarchy, query: Query, found: Found, stored: StoredKey
    ) -> bool:
        """Whether a tier is to lose its part of a block that lives here.

        Not where its labels there merely lack what is yet to be written: that others use it by now.
        """
        key = BlockKey(stored[:-1])
        labels = self._lifetimes.register.get(key)
        if labels is None or (labels.pins and not query.include_pinned):
            return False
        is_told = below.relabels.knows(key, found.meant[stored], found.at)
        return not is_told or query.fits(labels)

    def _sweep(self) -> list[Purge]:
        now_s, register = self._lifetimes.clock(), self._lifetimes.register
        purges = []
        if register.next_expiry <= now_s and (self._expiring is None or self._expiring.is_walked):
            # What a request holds it is using now: that puts off an end that counts from every use.
            for lease in self._leases:
                self._upkeep.renew(lease)
            self._expiring = self._forgetting.expire()
            purges.append(self._purge(self._expiring))
        if self._restoring is None or self._restoring.is_done:
            # Before that it is not known when a session was used last.
            purges += [self._time_out(one) for one in self._lifetimes.sessions.due(now_s)]
        return purges

    def _time_out(self, session_id: SessionId) -> Purge:
        """End a session that nobody used here; what another machine computed for it since is left to that."""
        session = self._lifetimes.sessions.get(session_id)
        assert session is not None
        query = replace(_of_session(session_id), created_before=session.used_at)
        return self._end_session(session_id, query, Reach.SOON)

    def _end_session(self, session_id: SessionId, elsewhere: Query, reach: Reach) -> Purge:
        query = _of_session(session_id)
        forgotten = self._begin(query, elsewhere, reach)
        for labels, keys in self._lifetimes.register.of_session(session_id):
            if query.spares(labels):
                # Counted now: their labels do not name the session when their turn comes.
                forgotten.pinned.update(keys)
        self._upkeep.apply(self._lifetimes.end_session(session_id))
        return self._purge(forgotten)


def _of_session(session_id: SessionId) -> Query:
    return Query(
        sessions=frozenset((session_id.name,)), namespaces=frozenset((session_id.namespace,))
    )
