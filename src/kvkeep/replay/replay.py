"""One pass of a trace over the real index, pool, policies and tier stack, without any bytes."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from kvkeep.blocks import BlockLedger, BlockPool, Entry, stored_key
from kvkeep.policies import make_policy
from kvkeep.replay.settings import ReplaySettings
from kvkeep.replay.timed_policy import TimedPolicy
from kvkeep.replay.visits import Visit
from kvkeep.spec import BlockId, BlockKey, GroupSpec, LayerKind, StoredKey
from kvkeep.tiers.base import Got, Occasion, Presence
from kvkeep.tiers.phantom import PhantomTier, phantom_bytes
from kvkeep.tiers.stack import Floor, TierStack

__all__ = ["Passed", "PassedLevel", "Replay"]

_GROUP = GroupSpec(name="trace", kind=LayerKind.FULL, layers=(0,))


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedLevel:
    """What one place did. `read_bytes` went up from it, `written_bytes` came down into it from above."""

    name: str
    policy: str
    capacity_bytes: int
    used_bytes: int
    hits: int
    read_bytes: int
    written_bytes: int
    num_evictions: int
    policy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """What a trace met, the device first. `prefix_hits` are blocks with every block before them found too."""

    num_lookups: int
    hits: int
    prefix_hits: int
    took_s: float
    levels: tuple[PassedLevel, ...]


class Replay:
    """Device and tiers of one pass. Each request has ended when the next one comes.

    A request shares what the device has, gets from the nearest tier what one has, computes the rest, and
    seals every full block. What the device evicts for it is offered to the stack before its place is reused.
    """

    def __init__(self, settings: ReplaySettings, num_places: int) -> None:
        """More than `num_places` blocks are of no use to the trace; they bound what is allocated."""
        self._settings = settings
        self._policy: TimedPolicy[BlockId] = TimedPolicy(make_policy(settings.policy))
        self._pool = BlockPool(min(settings.num_blocks, num_places), self._policy)
        self._ledger = BlockLedger(
            _GROUP, self._pool, on_evict=self._demote if settings.tiers else None
        )
        self._tier_policies: list[TimedPolicy[StoredKey]] = [
            TimedPolicy(make_policy(tier.policy, by_content=True)) for tier in settings.tiers
        ]
        self._tiers = [
            PhantomTier(tier.capacity_bytes, policy=policy, name=tier.name)
            for tier, policy in zip(settings.tiers, self._tier_policies, strict=True)
        ]
        self._stack = TierStack(
            [
                Floor(phantom, tier.write_on)
                for phantom, tier in zip(self._tiers, settings.tiers, strict=True)
            ]
        )
        self._resting = None if settings.idle_s is None else _Resting(settings.idle_s * 1e3)
        self._parts = (phantom_bytes(settings.block_bytes),)
        self._hits = [0] * (1 + len(settings.tiers))
        self._prefix_hits = 0
        self._num_lookups = 0
        self._took_s = 0.0

    def run(self, visits: Sequence[Visit]) -> Passed:
        """Replay visits, in order of time, which all fit on the device; returns what passed so far."""
        start = perf_counter()
        for visit in visits:
            self._serve(visit)
        self._took_s += perf_counter() - start
        self._num_lookups += sum(len(visit.keys) for visit in visits)
        return Passed(
            num_lookups=self._num_lookups,
            hits=sum(self._hits),
            prefix_hits=self._prefix_hits,
            took_s=self._took_s,
            levels=tuple(self._levels()),
        )

    def check(self) -> list[str]:
        """What is wrong with the device's books, in words; empty when all is well."""
        return self._ledger.check([0] * self._pool.num_blocks)

    def _serve(self, visit: Visit) -> None:
        ledger, pool = self._ledger, self._pool
        if self._resting is not None:
            self._offload(self._resting.take(visit.at_ms))
        found = ledger.find(visit.keys, visit.contents)
        known = [block for block in found if block is not None]
        missing = [key for key, block in zip(visit.keys, found, strict=True) if block is None]
        loaded = self._load(missing) if self._tiers and missing else set()
        self._count(visit, found, loaded)
        pool.acquire(known)
        allocation = ledger.allocate(visit.num_places - len(known))
        assert allocation is not None, "requests that do not fit are left out"
        table, new_blocks, new_entries = [], [], []
        fresh = iter(allocation.blocks)
        for at, entry in enumerate(visit.entries):
            block = found[at] if at < len(found) else None
            if block is None:
                block = next(fresh)
                new_blocks.append(block)
                new_entries.append(entry)
            table.append(block)
        ledger.seal(new_blocks, new_entries)
        if self._tiers:
            self._offer(visit, found, {entry.key for entry in new_entries} - loaded)
        pool.release([*table, *fresh])
        if self._resting is not None:
            self._resting.add(visit.at_ms, [entry.key for entry in visit.entries])

    def _load(self, keys: Sequence[BlockKey]) -> set[BlockKey]:
        """Get what the tiers have of these, the last first, so that a chain's root is used last."""
        stored = {stored_key(key, 0): key for key in reversed(keys)}
        sightings = self._stack.find(list(stored))
        loaded = set()
        for name, key in stored.items():
            sighting = sightings.get(name)
            if sighting is not None and sighting.presence is Presence.PRESENT:
                got = self._stack.tiers[sighting.at].get(name, self._parts)
                if isinstance(got, Got):
                    self._hits[1 + sighting.at] += 1
                    loaded.add(key)
        return loaded

    def _count(self, visit: Visit, found: Sequence[BlockId | None], loaded: set[BlockKey]) -> None:
        self._hits[0] += len(found) - found.count(None)
        for key, block in zip(visit.keys, found, strict=True):
            if block is None and key not in loaded:
                break
            self._prefix_hits += 1

    def _offer(
        self, visit: Visit, found: Sequence[BlockId | None], computed: set[BlockKey]
    ) -> None:
        """Show the stack what the request has used and what it has made, leaves before roots."""
        if self._settings.touches_copies:
            shared = zip(visit.keys, found, strict=True)
            self._stack.touch([stored_key(key, 0) for key, block in shared if block is not None])
        keys = [entry.key for entry in reversed(visit.entries)]
        self._put([key for key in keys if key in computed], Occasion.FINISHED)
        self._put([key for key in keys if key not in computed], Occasion.REUSED)

    def _demote(self, _: Sequence[BlockId], entries: Sequence[Entry]) -> None:
        below = self._stack.find([stored_key(entry.key, 0) for entry in entries])
        lost = [entry.key for entry in entries if stored_key(entry.key, 0) not in below]
        self._put(lost, Occasion.EVICTED)

    def _offload(self, keys: Sequence[BlockKey]) -> None:
        """What rests leaves the device once a tier has it."""
        resting = [key for key in keys if self._ledger.get(key) is not None]
        self._put(resting, Occasion.IDLE)
        below = self._stack.find([stored_key(key, 0) for key in resting])
        blocks = [self._ledger.get(key) for key in resting if stored_key(key, 0) in below]
        self._ledger.forget([block for block in blocks if block is not None])

    def _put(self, keys: Sequence[BlockKey], occasion: Occasion) -> None:
        """Offer blocks to the stack, those that some tier lacks which takes them now."""
        tiers = [floor.tier for floor in self._stack.floors if occasion in floor.write_on]
        if not tiers or not keys:
            return
        make_parts, num_bytes = partial(iter, self._parts), self._parts[0].nbytes
        stored = [stored_key(key, 0) for key in keys]
        places = zip(*(tier.find(stored) for tier in tiers), strict=True)
        for key, presences in zip(stored, places, strict=True):
            if Presence.ABSENT in presences:
                self._stack.put(key, make_parts, num_bytes, occasion)

    def _levels(self) -> list[PassedLevel]:
        settings, block_bytes = self._settings, self._settings.block_bytes
        device = PassedLevel(
            name="device",
            policy=settings.policy,
            capacity_bytes=settings.capacity_bytes,
            used_bytes=(self._pool.num_blocks - self._pool.num_free) * block_bytes,
            hits=self._hits[0],
            read_bytes=0,
            written_bytes=0,
            num_evictions=self._pool.num_evictions,
            policy_s=self._policy.spent_s,
        )
        tiers = [
            PassedLevel(
                name=tier.name,
                policy=own.policy,
                capacity_bytes=tier.capacity_bytes,
                used_bytes=tier.used_bytes,
                hits=hits,
                read_bytes=tier.got_bytes,
                written_bytes=tier.put_bytes,
                num_evictions=tier.stats().num_evictions,
                policy_s=policy.spent_s,
            )
            for tier, own, policy, hits in zip(
                self._tiers, settings.tiers, self._tier_policies, self._hits[1:], strict=True
            )
        ]
        return [device, *tiers]


class _Resting:
    """Which blocks nobody used for a while, found out as time passes."""

    def __init__(self, idle_ms: float) -> None:
        self._idle_ms = idle_ms
        self._used: deque[tuple[float, list[BlockKey]]] = deque()
        self._key_to_last_ms: dict[BlockKey, float] = {}

    def add(self, at_ms: float, keys: list[BlockKey]) -> None:
        """Blocks are used at a time that is not before those of earlier calls."""
        self._used.append((at_ms, keys))
        self._key_to_last_ms.update(dict.fromkeys(keys, at_ms))

    def take(self, now_ms: float) -> list[BlockKey]:
        """Blocks whose last use has become old enough, once for each such use, leaves before roots."""
        taken = []
        while self._used and self._used[0][0] + self._idle_ms <= now_ms:
            at_ms, keys = self._used.popleft()
            for key in reversed(keys):
                if self._key_to_last_ms.get(key) == at_ms:
                    del self._key_to_last_ms[key]
                    taken.append(key)
        return taken
