"""Promotion: blocks on their way from a tier into the arena.

A load has a holder of its own on its block, so that the place stays its own until the last byte has arrived,
whatever becomes of the request. The block is published when its bytes are verified, and never otherwise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from kvkeep.blocks import Entry, stored_key
from kvkeep.cache.base import PayloadStore
from kvkeep.cache.lease import Lease, PendingLoad
from kvkeep.cache.places import Places
from kvkeep.cache.sealing import block_entry
from kvkeep.cache.stored_blocks import wanted_header
from kvkeep.planning import GroupBlocks, StoredBlock
from kvkeep.spec import BlockId, BlockKey, KVSpec, StoredKey
from kvkeep.tiers.base import Miss, MissCause, Tier
from kvkeep.tiers.lanes import Lane, Results
from kvkeep.tiers.reading import Verified, read_block
from kvkeep.tiers.stack import TierStack
from kvkeep.tiers.stored_form import StoredHeader, header_bytes

__all__ = ["Admit", "LoadCounts", "Loaded", "Loads"]

# Judges the labels of a block that has arrived from a tier, for that number of a lease if one waits: None to
# use it, or the cause for which it must not be.
Admit = Callable[[Entry, int, Lease | None, int, bytes], str | None]

# A load that takes longer than this is given up: its block is computed instead.
LATE_S = 30.0
_MOST_JOBS = 2**16
_FAILED_CHECKS = frozenset({MissCause.SHORT, MissCause.CORRUPT, MissCause.MISMATCH})


@dataclass(slots=True)
class LoadCounts:
    """What has been loaded from one tier, and why not."""

    num_blocks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that has come: `seconds` after it was asked for, behind `queued_bytes` of others."""

    at: int
    key: StoredKey
    num_bytes: int
    seconds: float
    queued_bytes: int


@dataclass(slots=True, kw_only=True)
class _Flight:
    """What is wanted where, and who waits for it: nobody, once it is late or the lease is closed."""

    entry: Entry
    group: int
    block: BlockId
    at: int
    deadline_s: float
    lease: Lease | None
    pending: PendingLoad
    header: StoredHeader
    asked_s: float
    queued_bytes: int
    arrived_s: float
    is_late: bool = False
    is_cancelled: bool = False


class Loads:
    """All loads that are under way. Owned by the thread that owns the books, worked on by lanes."""

    def __init__(
        self,
        spec: KVSpec,
        places: Places,
        payloads: PayloadStore,
        stack: TierStack,
        results: Results,
        *,
        late_s: float = LATE_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._spec = spec
        self._places = places
        self._payloads = payloads
        self._stack = stack
        self._results = results
        self._late_s = late_s
        self._clock = clock
        self._lanes = [
            Lane(f"load-{tier.name}", num_threads=_num_threads(tier), max_jobs=_MOST_JOBS)
            for tier in stack.tiers
        ]
        self._flights: dict[StoredKey, _Flight] = {}
        self._queued_bytes = [0] * len(stack.tiers)
        self.counts = [LoadCounts() for _ in stack.tiers]
        self.on_loaded: Callable[[Loaded], None] | None = None
        self.admit: Admit | None = None
        self.on_sealed: Callable[[BlockKey], None] | None = None
        # Hears of blocks that a tier gave, and that were not what they should be.
        self.on_rejected: Callable[[BlockKey], None] | None = None

    @property
    def num_under_way(self) -> int:
        """Loads whose blocks are held."""
        return len(self._flights)

    def is_loading(self, key: StoredKey) -> bool:
        """Whether the content of `key` is on its way, and worth waiting for."""
        flight = self._flights.get(key)
        return flight is not None and not flight.is_late

    def holds_key(self, key: StoredKey) -> bool:
        """Whether a load of `key` is under way, be it late: there cannot be another one."""
        return key in self._flights

    def queued_bytes(self, at: int) -> int:
        """Bytes of a tier that are still to arrive."""
        return self._queued_bytes[at]

    def holds(self) -> list[tuple[int, BlockId]]:
        """Group and block of every place that a load holds."""
        return [(flight.group, flight.block) for flight in self._flights.values()]

    def begin_all(
        self,
        lease: Lease,
        group_blocks: Sequence[GroupBlocks],
        group_to_loads: Sequence[Sequence[int]],
    ) -> None:
        """Begin to load the given numbers of each group, all of which lie in some tier."""
        for group, numbers in enumerate(group_to_loads):
            known = group_blocks[group].blocks
            for number in numbers:
                source = known[number]
                assert isinstance(source, StoredBlock)
                self.begin(lease, group, number, block_entry(lease.chain, number), source)

    def begin(
        self, lease: Lease, group: int, number: int, entry: Entry, source: StoredBlock
    ) -> None:
        """Fill the private block that `lease` has at `number`; `finish` comes through the results."""
        block = lease.tables[group].place(number)
        key = stored_key(entry.key, group)
        assert key not in self._flights, "whoever wants the same content waits for it"
        header = wanted_header(
            self._spec,
            group,
            entry,
            self._payloads.num_bytes(group, block),
            self._payloads.layout_name(group),
        )
        pending = PendingLoad(group, number, source.source)
        now_s = self._clock()
        flight = _Flight(
            entry=entry,
            group=group,
            block=block,
            at=source.at,
            deadline_s=now_s + self._late_s,
            lease=lease,
            pending=pending,
            header=header,
            asked_s=now_s,
            queued_bytes=self._queued_bytes[source.at],
            arrived_s=now_s,
        )
        self._queued_bytes[source.at] += header.payload_bytes
        self._places.ledgers[group].pool.acquire([block])
        self._flights[key] = flight
        lease.begin_load(pending, now_s)
        if not self._lanes[source.at].submit(partial(self._work, key, flight)):
            self._finish(key, flight, memoryview(b""), _refused())

    def give_up_late(self) -> None:
        """Tell the leases of loads that take too long to go on without them."""
        now_s = self._clock()
        for flight in self._flights.values():
            if now_s <= flight.deadline_s or flight.is_late:
                continue
            flight.is_late = True
            if flight.lease is not None:
                self._settle(flight, MissCause.LATE, now_s)

    def forget(self, lease: Lease) -> None:
        """The lease is closed; what arrives for it is kept all the same."""
        for flight in self._flights.values():
            if flight.lease is lease:
                flight.lease = None

    def cancel(self, keys: Iterable[StoredKey]) -> None:
        """The content of these is forgotten: what arrives is not to be used."""
        if self._flights:
            for key in keys:
                if key in self._flights:
                    self._flights[key].is_cancelled = True

    def close(self) -> None:
        """End the threads; the results of what they finish are still to be taken."""
        for lane in self._lanes:
            lane.close()

    def _work(self, key: StoredKey, flight: _Flight) -> None:
        """On a lane's thread: bytes only."""
        tier = self._stack.tiers[flight.at]
        payload = memoryview(b"")
        result: Verified | Miss
        if flight.lease is None:
            result = Miss(MissCause.LATE, "nobody waits for it any more")
        else:
            try:
                payload = self._payloads.target(flight.group, flight.block)
                result = read_block(tier, key, flight.header, self._spec.block_size, payload)
            except Exception as error:  # noqa: BLE001 - a tier of somebody else's may raise anything
                result = Miss(MissCause.UNAVAILABLE, f"{type(error).__name__}: {error}")
        # Now, and not when the owner comes to know it, which may be a long step later.
        flight.arrived_s = self._clock()
        self._results.add(partial(self._finish, key, flight, payload, result))

    def _finish(
        self, key: StoredKey, flight: _Flight, payload: memoryview, result: Verified | Miss
    ) -> None:
        """On the owner's thread: publish what has arrived, or say that it has not."""
        del self._flights[key]
        self._queued_bytes[flight.at] -= flight.header.payload_bytes
        ledger = self._places.ledgers[flight.group]
        if isinstance(result, Verified) and not self._payloads.adopt(
            flight.group, flight.block, payload, result.layout
        ):
            result = Miss(MissCause.MISMATCH, f"layout {result.layout}")
        if isinstance(result, Verified):
            # Before it is judged: what is refused is deleted, and must not be taken for present.
            self._count(key, flight)
        cause = result.cause if isinstance(result, Miss) else self._refuse(flight, result.labels)
        if cause in _FAILED_CHECKS and self.on_rejected is not None:
            self.on_rejected(flight.entry.key)
        if cause is None and (
            flight.lease is not None or ledger.pool.num_holders(flight.block) == 1
        ):
            ledger.seal([flight.block], [flight.entry])
            if self.on_sealed is not None:
                self.on_sealed(flight.entry.key)
        if flight.lease is not None:
            self._settle(flight, cause, flight.arrived_s)
        self._places.release(flight.group, [flight.block])

    def _refuse(self, flight: _Flight, labels: bytes) -> str | None:
        """Why a block that is whole must not be used all the same."""
        if flight.is_cancelled:
            return "invalidated"
        if self.admit is None:
            return None
        number = flight.pending.number
        return self.admit(flight.entry, flight.at, flight.lease, number, labels)

    def _settle(self, flight: _Flight, cause: str | None, at_s: float) -> None:
        """Take the load off its lease: as loaded, or as failed."""
        assert flight.lease is not None
        flight.lease.finish_load(flight.pending, cause, at_s)
        flight.lease = None
        if cause is not None:
            failures = self.counts[flight.at].failures
            failures[cause] = failures.get(cause, 0) + 1

    def _count(self, key: StoredKey, flight: _Flight) -> None:
        num_bytes = flight.header.payload_bytes + header_bytes(self._spec.block_size)
        seconds = flight.arrived_s - flight.asked_s
        counts = self.counts[flight.at]
        counts.num_blocks += 1
        counts.num_bytes += num_bytes
        counts.seconds += seconds
        if self.on_loaded is not None:
            self.on_loaded(Loaded(flight.at, key, num_bytes, seconds, flight.queued_bytes))


def _num_threads(tier: Tier) -> int:
    """Wires have latency to hide; files and memory are copied as fast as two cores do it."""
    return 2 if tier.capabilities.is_local else 4


def _refused() -> Miss:
    return Miss(MissCause.UNAVAILABLE, "too many loads are waiting")
