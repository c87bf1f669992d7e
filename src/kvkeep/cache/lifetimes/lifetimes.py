"""The life of cached blocks: claims of requests, sessions, tags, pins, and what has ended.

Bookkeeping only: what is to be forgotten is returned, and forgotten by who holds the places. For one thread.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from time import time
from typing import Protocol

from kvkeep.blocks import TokenChain
from kvkeep.cache.lifetimes.claims import Claim, pin_name, tag_parts
from kvkeep.cache.lifetimes.labels import (
    ContextId,
    Labels,
    PinId,
    SessionId,
    decode_labels,
    merge_labels,
)
from kvkeep.cache.lifetimes.purged import Purged
from kvkeep.cache.lifetimes.register import Change, Register
from kvkeep.cache.lifetimes.relevance import AUTO, turned_away, turns
from kvkeep.cache.lifetimes.selector import Query
from kvkeep.cache.lifetimes.sessions import Session, Sessions
from kvkeep.cache.lifetimes.settings import LifetimeSettings
from kvkeep.cache.lifetimes.versions import NewestVersions
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey

__all__ = ["Arrival", "Lifetimes", "Listener"]

_MOST_ENDED_PINS = 2**14


class Listener(Protocol):
    """Who hears what becomes of blocks, and who is to be forgotten with them."""

    def note_gone(self, keys: Collection[BlockKey], reason: str) -> None:
        """These blocks are not known any more: "evicted", "expired", "invalidated", "corrupt_rejected"."""
        ...

    def forget(self, root: BlockKey | None, session: str | None = None) -> None:
        """A session has ended, or all of a tenant was purged; None means every tenant."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What the labels of a block say that came from a tier; `refusal` is why it must not be used, if so.

    Unless `is_final` it is refused for what clocks may differ, and others may still use it.
    """

    refusal: str | None
    changes: list[Change]
    is_final: bool = True

    @property
    def is_alive(self) -> bool:
        """Whether the block may be used."""
        return self.refusal is None


class Lifetimes:
    """The labels of all blocks and the rules by which they change. `clock` is the wall clock, in seconds."""

    def __init__(
        self,
        settings: LifetimeSettings | None = None,
        *,
        clock: Callable[[], float] = time,
    ) -> None:
        self.settings = settings or LifetimeSettings()
        self.clock = clock
        self.register = Register()
        self.sessions = Sessions(self.settings.session_ttl_s)
        # Open claims, with the session that they are of.
        self._claims: dict[Claim, Session | None] = {}
        self._pins: dict[PinId, BlockKey] = {}
        self._ended_pins: OrderedDict[PinId, None] = OrderedDict()
        self.listener: Listener | None = None
        self.purged = Purged()
        self._newest = NewestVersions()

    # --- requests --------------------------------------------------------------------------------

    def open(self, options: CacheOptions, chain: TokenChain) -> Claim:
        """The claim of a request that has come; its session begins, or goes on, now."""
        ttl_s = options.ttl_s
        # A request that leaves nothing does not turn its session either: one that asks for a title, say.
        is_kept_out = not options.publishes
        session = context = before = known = None
        if options.session is not None:
            session = SessionId(chain.root, options.session)
            known = self.sessions.use(session, self.clock())
            known.num_open += 1
            known.num_requests += 1
            if not is_kept_out:
                context, before = self._context(known, options.context, chain), known.context
                known.context = context or before
        claim = Claim(
            namespace=chain.root,
            session=session,
            context=context,
            left_context=before if context is not None and context != before else None,
            parts=tag_parts(options.tag_spans, chain.block_size),
            ttl_s=self.settings.default_ttl_s if ttl_s is None else ttl_s,
            counts_from_first=options.ttl_counts_from == "first",
            priority=options.priority,
            is_kept_out=is_kept_out,
            is_silent=not options.write,
        )
        if options.pin and options.publishes and chain.keys:
            claim.pin, claim.num_pinned = pin_name(options, chain), len(chain.keys)
        self._claims[claim] = known
        return claim

    def plain(self, namespace: BlockKey) -> Claim:
        """The claim of who asks for nothing in particular."""
        claim = Claim(namespace=namespace, ttl_s=self.settings.default_ttl_s)
        self._claims[claim] = None
        return claim

    def outdating(self, claim: Claim) -> Query | None:
        """What a request outdates that brings other versions than came last; None if it does not."""
        new = self._newest.arrive(claim.namespace, claim.tags)
        if not new:
            return None
        return Query(versions=new, namespaces=frozenset((claim.namespace,)))

    def begin(self, claim: Claim, chain: TokenChain) -> list[BlockKey]:
        """Called once, when a request of a session begins to run: what that session has turned away from.

        Blocks of its last chain that this one does not have, and blocks that only another context of it used,
        as far as nobody else uses them; leaves come last.
        """
        session = self._claims.get(claim)
        if session is None or claim.session is None or claim.has_begun or not claim.publishes:
            return []
        claim.has_begun = True
        return turned_away(self.register, session, claim.left_context, chain.keys)

    def use(
        self, claim: Claim, chain: TokenChain, numbers: Sequence[int], *, is_new: bool
    ) -> list[Change]:
        """A request uses blocks of its chain, by number, in order; `is_new`: it has computed them."""
        if not numbers:
            return []
        keys = _keys_at(chain, numbers)
        now_s = self.clock()
        self.register.touch(keys, now_s)
        if claim.is_void or claim.is_silent:
            return []
        if len(claim.parts) == 1 and claim.pin is None:
            return self.register.update(keys, claim.on(claim.tags, now_s, is_new=is_new))
        by_tags: dict[frozenset[str], list[BlockKey]] = {}
        for number, key in zip(numbers, keys, strict=True):
            by_tags.setdefault(claim.tags_of(number), []).append(key)
        changes = [
            change
            for tags, own in by_tags.items()
            for change in self.register.update(own, claim.on(tags, now_s, is_new=is_new))
        ]
        pinned = [chain.keys[number] for number in numbers if number < claim.num_pinned]
        # One that was ended meanwhile does not come back.
        if claim.pin is not None and pinned and (not claim.has_pinned or self.has_pin(claim.pin)):
            claim.has_pinned = True
            changes += self.pin(claim.pin, claim.namespace, pinned)
        return changes

    def renew(self, claim: Claim, keys: Sequence[BlockKey]) -> list[Change]:
        """A request lets go of blocks: their use ends now, from where a sliding life counts."""
        if not claim.slides or not claim.publishes:
            return []
        end_s = self.clock() + claim.ttl_s

        def longer(old: Labels | None) -> Labels | None:
            return None if old is None else replace(old, expires_at=max(old.expires_at, end_s))

        return self.register.update(keys, longer)

    def close(self, claim: Claim, chain: TokenChain | None = None) -> None:
        """A request has ended; `chain` is what its session then knows as its last. Again does nothing."""
        if not claim.is_open:
            return
        claim.is_open = False
        session = self._claims.pop(claim)
        if session is None:
            return
        session.num_open -= 1
        # One that was closed meanwhile is not used any more, nor is one that began under its name.
        if self.sessions.get(session.session_id) is session:
            self.sessions.use(session.session_id, self.clock())
            if chain is not None and claim.publishes:
                session.chain = chain

    def void(self, query: Query) -> int:
        """Requests that a query means publish nothing any more; how many there were."""
        now_s = self.clock()
        if self.listener is not None and query.means_tenants:
            for root in (None,) if query.namespaces is None else query.namespaces:
                self.listener.forget(root)
        if query.keys is not None or query.used_before is not None:
            return 0
        num_void = 0
        for claim in self._claims:
            if not claim.is_void and query.fits(claim.on(claim.tags, now_s, is_new=True)(None)):
                claim.is_void = True
                num_void += 1
        return num_void

    # --- what comes from tiers ---------------------------------------------------------------------

    def arrive(
        self, key: BlockKey, namespace: BlockKey, encoded: bytes, *, is_used: bool = True
    ) -> Arrival:
        """A block has come from a tier, with these labels or b""; they join those that are known.

        With `is_used` its sessions are used by that.
        """
        now_s = self.clock()
        labels = self._labels_of(namespace, encoded, now_s)
        if labels is None:
            return Arrival("invalidated", [])
        known = self.register.get(key)
        if max(labels.ends_at, known.ends_at if known else 0.0) <= now_s:
            is_final = labels.ends_at + self.settings.max_clock_skew_s <= now_s
            return Arrival("expired", [], is_final=is_final)
        if known is None and self.purged.means(key, labels):
            return Arrival("invalidated", [])
        changes = self._doubted(self._add(key, labels))
        for name in labels.sessions:
            self._note_session(SessionId(namespace, name), labels, is_used=is_used)
        for pin in labels.pins:
            self._pins.setdefault(pin, namespace)
        return Arrival(None, changes)

    def enter(self, key: BlockKey, namespace: BlockKey) -> list[Change]:
        """A block is brought from outside, as one that nobody asked anything for."""
        now_s = self.clock()
        self.register.forget(self.register.dead((key,), now_s))
        return self._add(key, self._plain_labels(namespace, now_s))

    def restore(self, key: BlockKey, encoded: bytes) -> bool:
        """At the start: a tier has a block with these labels; False when it is to be deleted.

        One without labels is left alone: they come when it is loaded.
        """
        if not encoded:
            return True
        labels = decode_labels(encoded)
        if labels is None:
            return False
        arrival = self.arrive(key, labels.namespace, encoded, is_used=False)
        return arrival.is_alive or not arrival.is_final

    def is_being_purged(self, key: BlockKey, encoded: bytes) -> bool:
        """Whether a block in a tier, with these labels or b"", is left to a purge that goes on."""
        labels = decode_labels(encoded) if encoded else None
        return labels is not None and self.purged.is_under_way(key, labels)

    # --- sessions ----------------------------------------------------------------------------------

    def end_session(self, session_id: SessionId) -> list[Change]:
        """End a session: its requests publish nothing any more, what it leaves is others'."""
        for claim in self._claims:
            claim.is_void |= claim.session == session_id
        self.sessions.end(session_id)
        if self.listener is not None:
            self.listener.forget(session_id.namespace, session_id.name)
        keys = [key for _, own in self.register.of_session(session_id) for key in own]
        return self.register.update(
            keys, lambda old: None if old is None else old.without_session(session_id.name)
        )

    def fork_session(self, parent: SessionId, child: SessionId) -> list[Change]:
        """Begin a session that uses all that `parent`, which there is, does."""
        now_s = self.clock()
        origin = self.sessions.use(parent, now_s)
        session = self.sessions.use(child, now_s)
        session.chain, session.context = origin.chain, origin.context
        keys = [key for _, own in self.register.of_session(parent) for key in own]

        def share(old: Labels | None) -> Labels | None:
            if old is None:
                return None
            contexts = {
                ContextId(child.name, one.name)
                for one in old.contexts
                if one.session == parent.name
            }
            return replace(
                old, sessions=old.sessions | {child.name}, contexts=old.contexts | contexts
            ).bounded()

        return self.register.update(keys, share)

    # --- pins --------------------------------------------------------------------------------------

    def pin(self, pin: PinId, namespace: BlockKey, keys: Sequence[BlockKey]) -> list[Change]:
        """Keep known blocks until `unpin`; several pins may mean the same block."""
        self._pins[pin] = namespace
        self._ended_pins.pop(pin, None)

        def keep(old: Labels | None) -> Labels | None:
            return None if old is None else replace(old, pins=old.pins | {pin})

        return self.register.update(keys, keep)

    def unpin(self, pin: PinId) -> list[Change]:
        """End a pin; what no other means is kept no longer than its labels say."""
        self._pins.pop(pin, None)
        self._ended_pins[pin] = None
        self._ended_pins.move_to_end(pin)
        if len(self._ended_pins) > _MOST_ENDED_PINS:
            self._ended_pins.popitem(last=False)
        keys = [key for _, own in self.register.pinned(pin) for key in own]
        changes = self.register.update(
            keys, lambda old: None if old is None else old.without_pin(pin)
        )
        return self._doubted(changes)

    @property
    def pins(self) -> dict[PinId, BlockKey]:
        """All pins, with the namespace of their blocks."""
        return dict(self._pins)

    def has_pin(self, pin: PinId) -> bool:
        """Whether there is such a pin."""
        return pin in self._pins

    # --- what has ended ----------------------------------------------------------------------------

    def tell_gone(self, keys: Collection[BlockKey], reason: str) -> None:
        """Blocks are not known any more, anywhere."""
        if self.listener is not None and keys:
            self.listener.note_gone(keys, reason)

    def next_due(self) -> float:
        """Nothing ends of itself before this time."""
        return min(self.register.next_expiry, self.sessions.next_end)

    # --- parts -------------------------------------------------------------------------------------

    def _context(self, session: Session, asked: str | None, chain: TokenChain) -> str | None:
        if asked != AUTO:
            return asked
        is_auto = session.context is not None and session.context.startswith(f"{AUTO}:")
        if not is_auto or turns(self.register, session, chain.keys, self.settings.context_share):
            session.num_auto += 1
            return f"{AUTO}:{session.num_auto}"
        return session.context

    def _labels_of(self, namespace: BlockKey, encoded: bytes, now_s: float) -> Labels | None:
        """What the bytes say; None where they cannot be read, are of another tenant, or name no user."""
        if not encoded:
            # Written before there were labels: whoever computed it did not ask for anything.
            return self._plain_labels(namespace, now_s)
        labels = decode_labels(encoded)
        if labels is None or labels.namespace != namespace:
            return None
        labels = labels.kept(
            lambda one: not self.sessions.has_ended(one), lambda one: one not in self._ended_pins
        )
        if labels.is_orphaned:
            return None
        return replace(labels, expires_at=labels.expires_at - self.settings.max_clock_skew_s)

    def _plain_labels(self, namespace: BlockKey, now_s: float) -> Labels:
        end_s = now_s + self.settings.default_ttl_s
        return Labels(namespace=namespace, is_shared=True, created_at=now_s, expires_at=end_s)

    def _add(self, key: BlockKey, labels: Labels) -> list[Change]:
        return self.register.update(
            [key], lambda old: labels if old is None else merge_labels(old, labels)
        )

    def _doubted(self, changes: list[Change]) -> list[Change]:
        """Blocks that a purge of older versions has not met, or has spared, are about now."""
        for change in changes:
            self._newest.doubt(change.new.namespace, change.new.tags)
        return changes

    def _note_session(self, session_id: SessionId, labels: Labels, *, is_used: bool) -> None:
        """A session that labels from a tier name goes on here."""
        if not is_used:
            self.sessions.restore(session_id, labels.created_at)
        elif self.sessions.get(session_id) is None:
            self.sessions.use(session_id, self.clock()).created_at = labels.created_at


def _keys_at(chain: TokenChain, numbers: Sequence[int]) -> Sequence[BlockKey]:
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return chain.keys[numbers[0] : numbers[-1] + 1]
    return [chain.keys[number] for number in numbers]
