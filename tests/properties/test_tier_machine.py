"""The cache over tiers against what must hold: right content, exact gaps, nothing lost that was not taken."""

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
from kvkeep.spec import GroupSpec
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Occasion
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.stack import Floor
from tests.content_store import (
    CheckedCache,
    chunked,
    full,
    quantised,
    recurrent,
    sliding,
    spec_of,
)

KIND_TO_GROUPS: dict[str, tuple[GroupSpec, ...]] = {
    "full": (full(),),
    "full+full": (full("a"), full("b")),
    "full+sliding": (full(), sliding(3)),
    "full+recurrent": (full(), recurrent()),
    "all": (sliding(2), full("a"), chunked(6), full("b"), recurrent()),
    "first blocks apart": (quantised("a"), full(), sliding(3), quantised("b")),
}
DOCUMENTS = ([0] * 14, [0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1, 2, 2, 2, 2])
MAX_OPEN = 3
OBJECT_BYTES = 4096 + 64
ALL = frozenset(Occasion)

prompts = st.builds(
    lambda document, cut, suffix: document[:cut] + suffix or [0],
    st.sampled_from(DOCUMENTS),
    st.integers(0, 14),
    st.lists(st.integers(0, 2), max_size=4),
)
pick = st.integers(0, 10**6)


class TierMachine(RuleBasedStateMachine):
    """Open leases over a small device and two tiers, whose objects vanish and rot."""

    groups: tuple[GroupSpec, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.leases: list[Lease] = []

    @initialize(
        num_blocks=st.integers(4, 9),
        near=st.integers(2, 40),
        far=st.integers(2, 400),
        share=st.sampled_from([0.0, 0.05, 0.2]),
        seed=st.integers(0, 2**16),
    )
    def begin(self, num_blocks: int, near: int, far: int, share: float, seed: int) -> None:
        spec = spec_of(*self.groups)
        kinds = ("fail", "truncate", "flip", "swap", "vanish")
        faults = [
            Fault(kind, operation, probability=share)
            for kind in kinds
            for operation in ("get", "put")
        ]
        self.tiers = [
            FaultyTier(HostTier(num_objects * OBJECT_BYTES, name=name), faults, seed=seed)
            for name, num_objects in (("near", near), ("far", far))
        ]
        floors = [Floor(tier, ALL) for tier in self.tiers]
        self.checked = CheckedCache(spec, [num_blocks] * len(spec.block_classes), floors=floors)

    @precondition(lambda self: len(self.leases) < MAX_OPEN)
    @rule(prompt=prompts, write=st.booleans())
    def reserve(self, prompt: list[int], write: bool) -> None:
        lease = self.checked.reserve(prompt, write=write)
        if lease is not None:
            self.checked.check_lease(lease)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(at=pick, num_tokens=st.integers(1, 6))
    def step(self, at: int, num_tokens: int) -> None:
        lease = self.leases[at % len(self.leases)]
        if lease.gaps:
            self.checked.step(lease, num_tokens)

    @precondition(lambda self: self.leases)
    @rule(at=pick)
    def release(self, at: int) -> None:
        self.leases.pop(at % len(self.leases)).release()

    @rule(prompt=prompts, num_tokens=st.integers(1, 20), first=st.booleans())
    def serve(self, prompt: list[int], num_tokens: int, first: bool) -> None:
        """A request from its first token to its last, perhaps after all others have gone down."""
        if first:
            self.checked.cache.offload()
        lease = self.checked.reserve(prompt)
        if lease is not None:
            self.checked.check_lease(lease)
            self.checked.finish(lease, num_tokens)
            lease.release()

    @rule()
    def poll(self) -> None:
        self.checked.cache.poll()

    @rule()
    def offload(self) -> None:
        self.checked.cache.offload()

    @rule(at=pick, tier=st.integers(0, 1))
    def perforate(self, at: int, tier: int) -> None:
        """An object vanishes from a tier."""
        self.checked.settle()
        keys = sorted(one.key for one in self.tiers[tier].objects())
        if keys:
            self.tiers[tier].delete([keys[at % len(keys)]])

    @rule(at=pick, tier=st.integers(0, 1), where=pick, in_payload=st.booleans())
    def rot(self, at: int, tier: int, where: int, in_payload: bool) -> None:
        """A bit of an object flips."""
        self.checked.settle()
        objects = sorted((one.key, one.num_bytes) for one in self.tiers[tier].objects())
        if objects:
            key, num_bytes = objects[at % len(objects)]
            content = bytearray(num_bytes)
            if num_bytes <= 4096:
                return  # cut short by a fault
            self.tiers[tier].get(key, [memoryview(content)])
            # Of the header's padding, too: nothing of an object is without meaning.
            start = 4096 if in_payload else 0
            content[start + where % (num_bytes - start)] ^= 1 << where % 8
            self.tiers[tier].delete([key])
            self.tiers[tier].put(key, [memoryview(content)], num_bytes)

    @rule(prompt=prompts)
    def drop(self, prompt: list[int]) -> None:
        """What is dropped is known nowhere."""
        chain = self.checked.chain(prompt)
        self.checked.cache.drop(chain, range(len(chain.keys)))
        self.checked.settle()
        assert not any(ledger.get(key) for ledger in self.checked.ledgers for key in chain.keys)
        stored = {one.key[:32] for tier in self.tiers for one in tier.objects()}
        assert not stored.intersection(chain.keys)

    @invariant()
    def books_are_true(self) -> None:
        if hasattr(self, "checked"):
            report = self.checked.cache.verify()
            assert report.ok, report.problems

    def teardown(self) -> None:
        if hasattr(self, "checked"):
            for lease in self.leases:
                lease.release()
            self.checked.cache.close()


@pytest.mark.parametrize("kind", KIND_TO_GROUPS)
def test_tiers_keep_content_right(kind: str) -> None:
    """Whatever happens between device and tiers, queries read the tokens of their own request."""
    machine = type("Machine", (TierMachine,), {"groups": KIND_TO_GROUPS[kind]})
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=30))
