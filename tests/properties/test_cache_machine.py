"""The cache against a plain model: any order of requests, steps, forks, drops and evictions."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvkeep.cache import Lease
from kvkeep.spec import GroupSpec, LayerKind
from tests.content_store import (
    CheckedCache,
    chunked,
    full,
    positions,
    quantised,
    recurrent,
    sliding,
    spec_of,
)

KIND_TO_GROUPS: dict[str, tuple[GroupSpec, ...]] = {
    "full": (full(),),
    "full+full": (full("a"), full("b")),
    "sliding": (sliding(3),),
    "full+sliding": (full(), sliding(3)),
    "full+recurrent": (full(), recurrent()),
    "all": (sliding(2), full("a"), chunked(6), full("b"), recurrent()),
    "windows": (full("a"), sliding(5), chunked(4), full("b")),
    "first block apart": (quantised(),),
    "first blocks apart": (quantised("a"), full(), sliding(3), quantised("b")),
    "first block apart, recurrent": (quantised(), recurrent()),
}
# Requests begin like one of these, so that they share.
DOCUMENTS = ([0] * 14, [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1, 2, 2, 2, 2])
SALTS = ("", "tenant")
MAX_OPEN = 4

tokens = st.lists(st.integers(0, 2), max_size=4)
prompts = st.builds(
    lambda document, cut, suffix: document[:cut] + suffix or [0],
    st.sampled_from(DOCUMENTS),
    st.integers(0, 14),
    tokens,
)
pick = st.integers(0, MAX_OPEN - 1)


class CacheMachine(RuleBasedStateMachine):
    """Open leases over a small cache; `known` is the model: per group, the prefixes published."""

    groups: tuple[GroupSpec, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.leases: list[Lease] = []

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        policy=st.sampled_from(["lru", "slru"]),
        room=st.lists(st.integers(2, 24), min_size=5, max_size=5),
        room_of_first=st.lists(st.integers(1, 6), min_size=2, max_size=2),
    )
    def start(
        self, block_size: int, policy: str, room: list[int], room_of_first: list[int]
    ) -> None:
        """An empty cache of a random, small size."""
        spec = spec_of(*self.groups, block_size=block_size)
        firsts = room_of_first[: len(spec.first_block_groups)]
        self.checked = CheckedCache(spec, [*room[: len(self.groups)], *firsts], policy=policy)
        self.known: list[set[int]] = [set() for _ in self.groups]
        self.num_evictions = [0] * len(self.groups)

    def lease(self, number: int) -> Lease:
        """One of the open leases."""
        return self.leases[number % len(self.leases)]

    def count_evictions(self) -> list[int]:
        """Of each group, its first blocks included."""
        counts = [one.num_evictions for one in self.checked.cache.stats().groups]
        for at, count in zip(
            self.checked.spec.first_block_groups, counts[len(self.groups) :], strict=True
        ):
            counts[at] += count
        return counts[: len(self.groups)]

    def follow(self, published: list[set[int]] | None = None) -> None:
        """Bring the model up to date: what was published is known, but for what was evicted."""
        evictions = self.count_evictions()
        for group, num_evictions in enumerate(evictions):
            new = published[group] if published else set()
            known = self.known[group] | new
            found = self.checked.known_prefixes(group)
            assert found <= known, "something is known that nobody published"
            num_lost = len(known) - len(found)
            # A state is kept for others only where there is room for its copy.
            if self.groups[group].kind is LayerKind.RECURRENT:
                num_lost -= len(new - found)
            assert num_lost <= num_evictions - self.num_evictions[group], "content was lost"
            self.known[group], self.num_evictions[group] = found, num_evictions

    # --- rules -----------------------------------------------------------------------------------

    @precondition(lambda self: len(self.leases) < MAX_OPEN)
    @rule(prompt=prompts, salt=st.sampled_from(SALTS), read=st.booleans(), write=st.booleans())
    def reserve(self, prompt: list[int], salt: str, read: bool, write: bool) -> None:
        """A request begins; its gaps are what the cache said they would be."""
        cache = self.checked.cache
        chain = self.checked.chain(prompt, salt)
        expected, before = cache.gaps(chain), self.checked.snapshot()
        self.check_gaps(prompt, salt)
        lease = cache.reserve(chain, read=read or bool(len(prompt) % 2), write=write)
        if lease is None:
            assert self.checked.snapshot() == before
            assert self.leases, "a request alone in the cache must begin"
            return
        self.leases.append(lease)
        assert lease.gaps[-1].stop == len(prompt)
        assert lease.num_pending + lease.reused_tokens == len(prompt)
        if len(self.leases) > 1 and (read or len(prompt) % 2):
            assert tuple(lease.gaps) == expected
        self.follow()

    def check_gaps(self, prompt: list[int], salt: str) -> None:
        """A question about coverage agrees with the model and changes nothing."""
        checked, size = self.checked, self.checked.spec.block_size
        before = checked.snapshot()
        chain = checked.chain(prompt, salt)
        gaps, coverage = checked.cache.gaps(chain), checked.cache.coverage(chain)
        assert checked.snapshot() == before
        prefixes = checked.store.prefixes(chain)
        computed = set(positions(gaps))
        assert coverage.known_tokens in (len(prompt) - len(computed), len(prompt))
        for group, spec in enumerate(self.groups):
            if spec.kind is not LayerKind.FULL:
                continue
            missing = {
                position
                for position in range(len(prompt) // size * size)
                if prefixes[(position // size + 1) * size] not in self.known[group]
            }
            # What is missing and not computed can only be the beginning of a block, copied.
            assert len({position // size for position in missing - computed}) <= 1
            if len(self.groups) == 1:
                tail = range(min(len(prompt) // size * size, len(prompt) - 1), len(prompt))
                assert computed - missing <= set(tail), "something known is computed again"

    @precondition(lambda self: self.leases)
    @rule(number=pick, num_tokens=st.sampled_from([1, 2, 3, 5, 8, 100]))
    def step(self, number: int, num_tokens: int) -> None:
        """A part of what is missing is computed, and published where the request publishes."""
        self.compute(self.lease(number), num_tokens)

    @rule(prompt=prompts, salt=st.sampled_from(SALTS), num_tokens=st.sampled_from([1, 2, 4, 100]))
    def run_to_the_end(self, prompt: list[int], salt: str, num_tokens: int) -> None:
        """A whole request comes and goes, as far as there is room."""
        lease = self.checked.reserve(prompt, salt)
        self.follow()
        if lease is not None:
            while lease.gaps and self.compute(lease, num_tokens):
                self.checked.check_lease(lease)
            lease.release()
        self.follow()

    def compute(self, lease: Lease, num_tokens: int) -> bool:
        """One step of a lease, followed by the model; False without work or room."""
        checked = self.checked
        if not lease.gaps:
            return False
        spans, before = checked.front(lease, num_tokens), checked.snapshot()
        prefixes, size = checked.store.prefixes(lease.chain), checked.spec.block_size
        if not checked.step(lease, num_tokens):
            assert checked.snapshot() == before
            return False
        ends = {prefixes[p + 1] for p in positions(spans) if (p + 1) % size == 0}
        states = ends & {prefixes[spans[-1].stop]}
        published: list[set[int]] = []
        for group, table in zip(self.groups, lease.tables, strict=True):
            # What was forgotten while the lease only read it is not published again by it.
            kept = {prefixes[(number + 1) * size] for number in table.read_only}
            new = states if group.kind is LayerKind.RECURRENT else ends - kept
            published.append(new if lease.publishes else set())
        self.follow(published)
        return True

    @precondition(lambda self: self.leases)
    @rule(number=pick, num_tokens=st.sampled_from([1, 3, 8]))
    def cancel_step(self, number: int, num_tokens: int) -> None:
        """A step is planned and then not run."""
        lease, before = self.lease(number), self.checked.snapshot()
        spans = self.checked.front(lease, num_tokens)
        if spans and not self.checked.cache.extend(lease, spans):
            assert self.checked.snapshot() == before
        self.follow()

    @precondition(lambda self: self.leases)
    @rule(number=pick, new=tokens)
    def append(self, number: int, new: list[int]) -> None:
        """Generated tokens follow."""
        self.lease(number).append(new)

    @precondition(lambda self: 0 < len(self.leases) < MAX_OPEN)
    @rule(number=pick)
    def fork(self, number: int) -> None:
        """A second request goes on from the same tokens."""
        before = self.checked.snapshot()
        child = self.checked.cache.fork(self.lease(number))
        if child is None:
            assert self.checked.snapshot() == before
        else:
            self.leases.append(child)
        self.follow()

    @precondition(lambda self: self.leases)
    @rule(number=pick, back=st.integers(0, 9))
    def truncate(self, number: int, back: int) -> None:
        """The last tokens are taken back, computed or not."""
        lease = self.lease(number)
        num_tokens = min(lease.next_position, max(1, len(lease.chain) - back))
        before = (list(lease.gaps), len(lease.chain))
        if not self.checked.cache.truncate(lease, num_tokens):
            assert (list(lease.gaps), len(lease.chain)) == before
            return
        # Whoever takes tokens back from a model with states restores the state before them.
        prefix = self.checked.store.prefixes(lease.chain)[-1]
        for group, state in lease.states.items():
            self.checked.store.slots[group][state] = [prefix]

    @precondition(lambda self: self.leases)
    @rule(number=pick)
    def release(self, number: int) -> None:
        """A request ends, or is preempted."""
        self.leases.pop(number % len(self.leases)).release()
        self.follow()

    @rule(prompt=prompts, salt=st.sampled_from(SALTS), blocks=st.sets(st.integers(0, 13)))
    def drop(self, prompt: list[int], salt: str, blocks: set[int]) -> None:
        """Content is forgotten; its holders keep it."""
        chain = self.checked.chain(prompt, salt)
        size = self.checked.spec.block_size
        prefixes = self.checked.store.prefixes(chain)
        dropped = [block for block in blocks if block < len(chain.keys)]
        ends = {prefixes[(block + 1) * size] for block in dropped}
        expected = sum(len(known & ends) for known in self.known)
        self.known = [known - ends for known in self.known]
        assert self.checked.cache.drop(chain, dropped).num_blocks == expected
        self.follow()

    @rule(group=st.integers(0, 4), number=st.integers(0, 11))
    def forget_in_one_group(self, group: int, number: int) -> None:
        """One group loses a block that the others keep."""
        group %= len(self.groups)
        ledger = self.checked.ledgers[group]
        if sealed := sorted(ledger.sealed_blocks()):
            block = sealed[number % len(sealed)]
            self.known[group].remove(self.checked.store.slots[group][block][-1])
            self.checked.store.poison(group, ledger.forget([block]))
        self.follow()

    @rule(is_meant=st.sampled_from([True, False, False, False]))
    def clear(self, is_meant: bool) -> None:
        """Everything is forgotten, now and then; holders keep what they hold."""
        if not is_meant:
            return
        expected = sum(len(known) for known in self.known)
        assert self.checked.cache.clear().num_blocks == expected
        self.known = [set() for _ in self.groups]
        self.follow()

    # --- invariants ------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        """Books balance, and every lease has what it will read."""
        if not hasattr(self, "checked"):
            return
        report = self.checked.cache.verify()
        assert report.ok, report.problems
        stats = self.checked.cache.stats()
        assert stats.open_leases == len(self.leases)
        for group in stats.groups:
            assert group.free + group.reusable + group.in_use == group.num_blocks
        assert stats.in_use_bytes + stats.reusable_bytes + stats.free_bytes == stats.capacity_bytes
        for lease in self.leases:
            self.checked.check_lease(lease)

    def teardown(self) -> None:
        """Nothing is held once every request has ended."""
        while self.leases:
            self.leases.pop().release()
        if hasattr(self, "checked"):
            assert self.checked.cache.stats().in_use_bytes == 0
            assert self.checked.cache.verify().ok


@pytest.mark.parametrize("kind", KIND_TO_GROUPS)
def test_the_cache_agrees_with_a_plain_model(kind: str) -> None:
    """Whatever happens in whatever order, requests read their own tokens and nothing leaks."""
    machine = type("Machine", (CacheMachine,), {"groups": KIND_TO_GROUPS[kind]})

    run_state_machine_as_test(machine, settings=settings(stateful_step_count=40))

    assert issubclass(machine, CacheMachine)
