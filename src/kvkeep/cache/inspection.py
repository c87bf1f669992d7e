"""Questions about all that is known, answered in bits between steps: walks, reports and checks.

What is asked about is what is known when a walk begins, and each block is told as it is when its turn comes:
an answer may be of slightly different moments. What goes meanwhile is left out, what comes is not in it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import (
    BlockReport,
    Labels,
    Lifetimes,
    PinId,
    PinReport,
    Query,
    Session,
    SessionReport,
)
from kvkeep.cache.listing import Held, held_blocks, list_blocks
from kvkeep.cache.pin_holds import PinHolds
from kvkeep.cache.places import Places
from kvkeep.cache.receipts import VerifyReport
from kvkeep.cache.slices import Bits
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.audit import look_at

__all__ = ["Inspection"]

# Blocks of which a report is made in one go, and those that are only looked at.
_BIT = 64
_GROUPS = 256


class Inspection:
    """Looks at what the books and tiers have, and changes nothing. For the thread that owns the books."""

    def __init__(
        self, places: Places, lifetimes: Lifetimes, holds: PinHolds, below: Hierarchy | None
    ) -> None:
        self._places = places
        self._ledgers = places.ledgers
        self._lifetimes = lifetimes
        self._holds = holds
        self._below = below

    def known(self, query: Query, keys: Sequence[BlockKey]) -> list[BlockKey]:
        """Those of these blocks that a query means, pinned ones too."""
        register, now_s = self._lifetimes.register, self._lifetimes.clock()
        tombstone = replace(query, include_pinned=True).tombstone(register, now_s)
        last: Labels | None = None
        fits_last = False
        found = []
        for key in keys:
            labels = register.get(key)
            if labels is None:
                continue
            if labels is not last:
                last, fits_last = labels, tombstone.fits(labels)
            if fits_last and (tombstone.fits_key is None or tombstone.fits_key(key)):
                found.append(key)
        return found

    def walk(
        self, query: Query, wanted: Callable[[BlockKey], bool] | None = None
    ) -> Iterator[list[BlockKey]]:
        """Blocks that a query means, each once, in no order; an empty list where one may stop as well."""
        every = set[BlockKey]()
        for num_groups, (labels, keys) in enumerate(query.candidates(self._lifetimes.register)):
            if query.fits(labels):
                every.update(keys)
            if num_groups % _GROUPS == _GROUPS - 1:
                yield []
        order = list(every)
        for at in range(0, len(order), _BIT):
            part = order[at : at + _BIT]
            yield self.known(query, part if wanted is None else list(filter(wanted, part)))

    def labels(self, key: BlockKey) -> Labels | None:
        """What a block bears."""
        return self._lifetimes.register.get(key)

    def used_at(self, key: BlockKey) -> float | None:
        """When a block was used last, as far as is known."""
        return self._lifetimes.register.used_at(key)

    def held(self, keys: Sequence[BlockKey]) -> list[Held]:
        """Where each of a few blocks lies."""
        return held_blocks(keys, self._ledgers, self._below, self._places.spec.block_size)

    def reports(self, keys: Sequence[BlockKey]) -> list[BlockReport]:
        """Reports on those of a few blocks that are known."""
        size = self._places.spec.block_size
        register = self._lifetimes.register
        return list(list_blocks(keys, register, self._ledgers, self._below, size))

    def all_reports(self, keys: Sequence[BlockKey]) -> Bits[list[BlockReport]]:
        """Reports on those of many blocks that are known."""
        found: list[BlockReport] = []
        for at in range(0, len(keys), _BIT):
            found += self.reports(keys[at : at + _BIT])
            yield
        return found

    def session(self, session: Session) -> SessionReport:
        """What a session uses, and how it stands."""
        num_blocks = num_own = 0
        for labels, keys in self._lifetimes.register.of_session(session.session_id):
            num_blocks += len(keys)
            num_own += len(keys) if labels.is_owned_by(session.session_id.name) else 0
        ends_at = self._lifetimes.sessions.ends_at(session)
        return SessionReport(
            name=session.session_id.name,
            namespace=session.session_id.namespace,
            num_blocks=num_blocks,
            num_own_blocks=num_own,
            num_tokens=0 if session.chain is None else len(session.chain),
            num_requests=session.num_requests,
            num_running=session.num_open,
            context=session.context,
            created_at=session.created_at,
            used_at=session.used_at,
            ends_at=None if ends_at == float("inf") else ends_at,
        )

    def sessions(self) -> Bits[list[SessionReport]]:
        """All sessions, the longest unused first."""
        sessions, found = self._lifetimes.sessions, list[SessionReport]()
        for one in sessions.all():
            session = sessions.get(one.session_id)
            if session is not None:
                found.append(self.session(session))
            yield
        return found

    def pin(self, pin: PinId, namespace: BlockKey) -> PinReport:
        """What a pin means, and what is held of it."""
        keys = [key for _, own in self._lifetimes.register.pinned(pin) for key in own]
        return PinReport(
            name=pin,
            namespace=namespace,
            num_blocks=len(keys),
            num_on_device=sum(map(self._holds.is_held, keys)),
            stored={} if self._below is None else self._below.holds.num_held(keys),
        )

    def pin_names(self) -> frozenset[PinId]:
        """The names of all pins."""
        return frozenset(self._lifetimes.pins)

    def pins(self) -> Bits[list[PinReport]]:
        """All pins, by name."""
        found = []
        for pin, namespace in sorted(self._lifetimes.pins.items()):
            if self._lifetimes.has_pin(pin):
                found.append(self.pin(pin, namespace))
            yield
        return found

    def verify(self, query: Query, *, tiers: bool = False) -> Bits[VerifyReport]:
        """Check just the blocks that a query means: their places, and with `tiers` their objects."""
        num_checked = 0
        problems: list[str] = []
        for keys in self.walk(query):
            for ledger in self._ledgers:
                places = [(key, ledger.get(key)) for key in keys]
                for key, block in places:
                    num_checked += block is not None
                    if block is not None and ledger.key_of(block) != key:
                        problems.append(f"{key.hex()} on the device: its place has other content")
            yield
        books = VerifyReport(blocks_checked=num_checked, problems=tuple(problems))

        def is_meant(key: StoredKey) -> bool:
            return bool(self.known(query, [BlockKey(key[:-1])]))

        if tiers:
            return books + (yield from self.audit(is_meant))
        return books

    def audit(self, is_meant: Callable[[StoredKey], bool] | None = None) -> Bits[VerifyReport]:
        """Read the objects of every tier, or those that are meant, and compare them."""
        num_checked = 0
        problems: list[str] = []
        for tier in () if self._below is None else self._below.stack.tiers:
            for one in tier.objects():
                if is_meant is None or is_meant(one.key):
                    looked = look_at(tier, one)
                    num_checked += looked is not None
                    if looked is not None and looked.wrong is not None:
                        problems.append(f"{one.key.hex()} in a tier: {looked.problem}")
                yield
        return VerifyReport(blocks_checked=num_checked, problems=tuple(problems))
