"""A block store without bytes: slots name the tokens that they hold, so that wrong content shows.

What a slot holds is the number of a prefix: equal numbers mean equal namespace, equal tokens from
the first one on, and so equal position. A recurrent state holds the prefix that it has seen.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache import Claim, Hierarchy, KVCache, Lease, Lifetimes
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockId, GroupSpec, KVFormat, KVSpec, LayerFormat, LayerKind, Span
from kvkeep.tiers.stack import Floor, TierStack

# What no query may ever read.
UNWRITTEN = -1


class ContentStore:
    """A BlockStore that remembers, for every slot of every group, which prefix is there."""

    def __init__(self, spec: KVSpec, class_num_blocks: Sequence[int]) -> None:
        self.spec = spec
        self.num_rest = class_num_blocks[: len(spec.groups)]
        firsts = class_num_blocks[len(spec.groups) :]
        num_first = dict(zip(spec.first_block_groups, firsts, strict=True))
        self.slots = [
            [[UNWRITTEN] * self._slots_of(group) for _ in range(num_rest + num_first.get(at, 0))]
            for at, (group, num_rest) in enumerate(zip(spec.groups, self.num_rest, strict=True))
        ]
        self._prefixes: dict[tuple[bytes | int, int], int] = {}

    def _slots_of(self, group: GroupSpec) -> int:
        return 1 if group.kind is LayerKind.RECURRENT else self.spec.block_size

    def copy_block(self, group: int, source: BlockId, target: BlockId) -> None:
        num_rest = self.num_rest[group]
        assert (source < num_rest) == (target < num_rest), "a copy into another arena"
        self.slots[group][target] = self.slots[group][source][:]

    def reset_state(self, group: int, block: BlockId) -> None:
        self.slots[group][block] = [0]

    def poison(self, group: int, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            self.slots[group][block] = [UNWRITTEN] * self._slots_of(self.spec.groups[group])

    def num_bytes(self, group: int, block: BlockId) -> int:
        return 8 * len(self.slots[group][block])

    def layout_name(self, _group: int) -> str:
        return "content/1"

    def view(self, group: int, block: BlockId) -> memoryview:
        return memoryview(array("q", self.slots[group][block]).tobytes())

    def target(self, group: int, block: BlockId) -> memoryview:
        return memoryview(bytearray(self.num_bytes(group, block)))

    def adopt(self, group: int, block: BlockId, payload: memoryview, layout: str) -> bool:
        assert layout == "content/1"
        self.slots[group][block] = payload.cast("q").tolist()
        return True

    def prefixes(self, chain: TokenChain) -> list[int]:
        """The numbers of the chain's prefixes by length; the empty one is 0 in all namespaces."""
        numbers = [0]
        parent: bytes | int = chain.root
        for token in chain.tokens():
            parent = self._prefixes.setdefault((parent, token), len(self._prefixes) + 1)
            numbers.append(parent)
        return numbers


class CheckedCache:
    """A KVCache over a ContentStore, stepped as an engine would, watched at every read and write."""

    def __init__(
        self,
        spec: KVSpec,
        class_num_blocks: Sequence[int],
        *,
        policy: str = "lru",
        floors: Sequence[Floor] = (),
        idle_s: float | None = None,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        self.spec = spec
        self.store = ContentStore(spec, class_num_blocks)
        self.below = (
            Hierarchy(spec, self.store, TierStack(floors), idle_s=idle_s) if floors else None
        )
        self.cache = KVCache(
            spec,
            class_num_blocks,
            self.store,
            policy=policy,
            below=self.below,
            lifetimes=lifetimes,
        )
        self.ledgers = self.cache._ledgers

    def chain(self, token_ids: Sequence[int], salt: str = "") -> TokenChain:
        """A chain in the namespace of `salt`."""
        size = self.spec.block_size
        namespace = Namespace(model="m", positions="p", kv_format="f", block_size=size, salt=salt)
        return TokenChain(namespace.root_key(), size, token_ids)

    def reserve(
        self,
        token_ids: Sequence[int],
        salt: str = "",
        *,
        read: bool = True,
        write: bool = True,
        claim: Claim | None = None,
    ) -> Lease | None:
        """A lease for the tokens, or None."""
        chain = self.chain(token_ids, salt)
        lookup = self.cache.look_up(chain) if read else None
        while True:
            self.settle()
            lease = self.cache.reserve(chain, read=read, write=write, lookup=lookup, claim=claim)
            self.settle()
            if lease is None or not lease.failed:
                return lease
            self.cache.avoid_failed(lease, lookup)
            lease.release()

    def settle(self) -> None:
        """Wait until nothing is on its way between the device and the tiers."""
        while self.cache.is_moving:
            self.cache.wait(1.0)
            self.cache.poll()

    def serve(
        self, token_ids: Sequence[int], options: CacheOptions, num_tokens: int = 10**6
    ) -> int:
        """A request from its arrival to its end, so many tokens a step; the tokens that it computed."""
        chain = self.chain(token_ids, options.salt or "")
        claim = self.cache.open_claim(options, chain)
        lease = self.begin(
            token_ids, options.salt or "", read=options.read, write=options.write, claim=claim
        )
        num_pending = lease.num_pending
        assert self.finish(lease, num_tokens)
        lease.release()
        self.cache.close_claim(claim, lease.chain)
        return num_pending

    def begin(
        self,
        token_ids: Sequence[int],
        salt: str = "",
        *,
        read: bool = True,
        write: bool = True,
        claim: Claim | None = None,
    ) -> Lease:
        """A lease that must be had, and has what it will read."""
        lease = self.reserve(token_ids, salt, read=read, write=write, claim=claim)
        assert lease is not None
        self.check_lease(lease)
        return lease

    def gaps_of(self, token_ids: Sequence[int], salt: str = "") -> list[tuple[int, int]]:
        """What a request for the tokens would compute."""
        return [(gap.start, gap.stop) for gap in self.cache.gaps(self.chain(token_ids, salt))]

    def front(self, lease: Lease, num_tokens: int) -> tuple[Span, ...]:
        """The first `num_tokens` tokens of the lease's gaps; of the first gap only with states."""
        spans: list[Span] = []
        for gap in lease.gaps[:1] if lease.states else lease.gaps:
            stop = min(gap.stop, gap.start + num_tokens)
            if stop > gap.start:
                spans.append(Span(gap.start, stop))
                num_tokens -= len(spans[-1])
        return tuple(spans)

    def step(self, lease: Lease, num_tokens: int = 10**6) -> bool:
        """Compute the front of the lease's gaps; False when there is no room."""
        spans = self.front(lease, num_tokens)
        if not self.cache.extend(lease, spans):
            return False
        self.write(lease, spans)
        self.read(lease, spans)
        self.cache.commit(lease, spans)
        return True

    def finish(self, lease: Lease, num_tokens: int = 10**6) -> bool:
        """Compute all that is missing; False when there is no room."""
        while lease.gaps:
            if not self.step(lease, num_tokens):
                return False
        return True

    def warm(self, token_ids: Sequence[int], salt: str = "") -> None:
        """Compute the tokens and leave them behind."""
        lease = self.begin(token_ids, salt)
        assert self.finish(lease)
        lease.release()

    def write(self, lease: Lease, spans: Sequence[Span]) -> None:
        """Do what a forward pass writes; every place written must be the lease's alone."""
        prefixes, size = self.store.prefixes(lease.chain), self.spec.block_size
        for group, table in enumerate(lease.tables):
            slots = self.store.slots[group]
            if group in lease.states:
                state = lease.states[group]
                assert self.ledgers[group].is_private(state)
                assert slots[state] == [prefixes[spans[0].start]], (
                    "a step starts from a wrong state"
                )
                slots[state] = [prefixes[spans[0].stop]]
                continue
            for position in positions(spans):
                number, offset = divmod(position, size)
                if number in table.read_only:
                    continue
                block = table.blocks[number]
                assert block is not None, f"nowhere to write position {position}"
                is_apart = number == 0 and group in self.spec.first_block_groups
                assert (block >= self.store.num_rest[group]) == is_apart, "in another arena"
                assert self.ledgers[group].is_private(block), f"block {block} is not private"
                slots[block][offset] = prefixes[position + 1]

    def read(self, lease: Lease, spans: Sequence[Span]) -> None:
        """Do what the queries of `spans` read: the tokens of this request, at their places."""
        prefixes = self.store.prefixes(lease.chain)
        for group, spec in enumerate(self.spec.groups):
            if spec.kind is not LayerKind.RECURRENT:
                for query in positions(spans):
                    for position in range(spec.first_needed(query), query + 1):
                        self._check_slot(lease, group, position, prefixes)

    def check_lease(self, lease: Lease) -> None:
        """All that the lease holds as computed is right; all that its gaps will read is there."""
        prefixes, size = self.store.prefixes(lease.chain), self.spec.block_size
        pending = set(positions(lease.gaps))
        starts = [gap.start for gap in lease.gaps] or [len(lease.chain)]
        for group, spec in enumerate(self.spec.groups):
            table = lease.tables[group]
            if spec.kind is LayerKind.RECURRENT:
                self._check_states(lease, group, starts, prefixes)
                continue
            for start in starts:
                for position in range(spec.first_needed(start), start):
                    assert position in pending or table.blocks[position // size] is not None
            for position in range(min(len(lease.chain), len(table.blocks) * size)):
                number = position // size
                is_known = position not in pending or number in table.read_only
                if is_known and table.blocks[number] is not None:
                    self._check_slot(lease, group, position, prefixes)

    def _check_slot(self, lease: Lease, group: int, position: int, prefixes: Sequence[int]) -> None:
        number, offset = divmod(position, self.spec.block_size)
        block = lease.tables[group].blocks[number]
        assert block is not None, f"group {group}: position {position} has no block"
        found = self.store.slots[group][block][offset]
        assert found == prefixes[position + 1], f"group {group}: wrong content at {position}"

    def _check_states(
        self, lease: Lease, group: int, starts: Sequence[int], prefixes: Sequence[int]
    ) -> None:
        slots, table = self.store.slots[group], lease.tables[group]
        for at, start in enumerate(starts):
            number = start // self.spec.block_size - 1
            saved = table.blocks[number] if 0 <= number < len(table.blocks) else None
            is_saved = start % self.spec.block_size == 0 and saved is not None
            if is_saved:
                assert saved is not None
                assert slots[saved] == [prefixes[start]], "a saved state is wrong"
            elif start > 0:
                assert at == 0, "a later gap has no state to start from"
                assert slots[lease.states[group]] == [prefixes[start]], "the running state is wrong"

    def known_prefixes(self, group: int) -> set[int]:
        """The prefixes that end with a block whose content the cache would share."""
        return {self.store.slots[group][block][-1] for block in self.ledgers[group].sealed_blocks()}

    def assert_idle(self) -> None:
        """Nothing is held and nothing is wrong."""
        stats, report = self.cache.stats(), self.cache.verify()
        assert stats.in_use_bytes == 0
        assert stats.open_leases == 0
        assert report.ok, report.problems

    def snapshot(self) -> object:
        """Everything that a call which changes nothing must leave as it was."""
        return (
            self.cache.stats(),
            [sorted(ledger.sealed_blocks()) for ledger in self.ledgers],
            [self.known_prefixes(group) for group in range(len(self.ledgers))],
        )


def positions(spans: Sequence[Span]) -> Iterator[int]:
    """The positions of all spans, in order."""
    for span in spans:
        yield from range(span.start, span.stop)


def full(name: str = "full") -> GroupSpec:
    """A group that reads everything."""
    return _attention(name, LayerKind.FULL, None)


def quantised(name: str = "quantised") -> GroupSpec:
    """The same in eight bits."""
    int8 = LayerFormat(KVFormat.INT8, KVFormat.INT8)
    return replace(full(name), formats=(int8,))


def sliding(window: int, name: str = "sliding") -> GroupSpec:
    """A group that reads the last `window` positions."""
    return _attention(name, LayerKind.SLIDING, window)


def chunked(window: int, name: str = "chunked") -> GroupSpec:
    """A group that reads its own chunk of `window` positions."""
    return _attention(name, LayerKind.CHUNKED, window)


def recurrent(name: str = "recurrent") -> GroupSpec:
    """A group that carries a state."""
    return GroupSpec(name=name, kind=LayerKind.RECURRENT, layers=(0,), state_bytes=16)


def spec_of(*groups: GroupSpec, block_size: int = 4) -> KVSpec:
    """A model of these groups; first blocks of quantised ones lie apart."""
    return KVSpec(groups=groups, block_size=block_size, dtype="float32", exact_first_block=True)


def _attention(name: str, kind: LayerKind, window: int | None) -> GroupSpec:
    return GroupSpec(
        name=name, kind=kind, layers=(0,), window=window,
        k_heads=1, k_dim=1, v_heads=1, v_dim=1, itemsize=4,
    )  # fmt: skip


def cache_of(*groups: GroupSpec, room: int = 32, block_size: int = 4) -> CheckedCache:
    """An empty cache with `room` blocks a group; full attention where nothing is said."""
    spec = spec_of(*(groups or (full(),)), block_size=block_size)
    return CheckedCache(spec, [room] * len(spec.groups))


EVERY_MODEL = pytest.mark.parametrize(
    "groups",
    [
        (full(),),
        (full("a"), full("b")),
        (full(), sliding(6)),
        (sliding(6),),
        (full(), chunked(8)),
        (full(), recurrent()),
        (full(), sliding(6), recurrent()),
    ],
    ids=lambda groups: "+".join(group.name for group in groups),
)
