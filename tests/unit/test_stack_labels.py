"""Labels on their way through a stack of tiers, and through wrappers."""

from collections.abc import Callable

from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, Occasion, Presence, PutOutcome
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.metered import Metered, Operation
from kvkeep.tiers.stack import Floor, TierStack

PAGE = 4096
ALL = frozenset(Occasion)
WHEN_EVICTED = frozenset({Occasion.EVICTED})


class Jobs:
    """Jobs that wait until they are told to run."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def defer(self, job: Callable[[], None]) -> bool:
        """Queue a job."""
        self.waiting.append(job)
        return True

    def run(self) -> None:
        """Do all of them."""
        while self.waiting:
            self.waiting.pop(0)()


def stack_of_two() -> TierStack:
    """Room for one object above, and for many below, where only what falls is written."""
    below = HostTier(64 * PAGE, name="below")
    return TierStack([Floor(HostTier(PAGE, name="above"), ALL), Floor(below, WHEN_EVICTED)])


def put(stack: TierStack, number: int, labels: bytes = b"") -> dict[int, PutOutcome]:
    """Write a test object on the usual occasion."""
    content = memoryview(content_of(key_of(number), PAGE))
    return stack.put(key_of(number), lambda: [content], PAGE, Occasion.FINISHED, labels=labels)


def test_a_put_brings_its_labels_to_every_tier() -> None:
    """To those above and to those below that take it."""
    tiers = [HostTier(64 * PAGE, name=name) for name in ("above", "below")]
    stack = TierStack([Floor(tier, ALL) for tier in tiers])

    put(stack, 1, b"tag")

    assert [tier.labels(key_of(1)) for tier in tiers] == [b"tag", b"tag"]


def test_what_falls_keeps_its_labels() -> None:
    """Those that it had last, at once or when its job runs; who asked is told where it landed."""
    for is_deferred in (False, True):
        stack, jobs = stack_of_two(), Jobs()
        landed: list[tuple[object, ...]] = []
        stack.on_landed = lambda *what, landed=landed: landed.append(what)
        if is_deferred:
            stack.defer = jobs.defer
        put(stack, 1, b"first")
        stack.tiers[0].relabel(key_of(1), b"second")
        put(stack, 2)
        jobs.run()

        assert stack.tiers[1].labels(key_of(1)) == b"second"
        assert read_object(stack.tiers[1], key_of(1), PAGE) == content_of(key_of(1), PAGE)
        assert landed == [(key_of(1), b"second", {1: PutOutcome.STORED})]


def test_relabelling_is_metered() -> None:
    """One call for many objects, and what became of each."""
    tier = Metered(HostTier(64 * PAGE))
    store_object(tier, key_of(1), 100)

    tier.relabel(key_of(1), b"tag")
    tier.revise_labels([key_of(1), key_of(2)], lambda _key, old: old + b" other")

    meter = tier.meter.operations[Operation.RELABEL]
    assert (meter.num_calls, meter.outcomes) == (2, {"done": 2, "absent": 1})


def test_relabelling_can_fail_on_purpose() -> None:
    """One by one, also where many are asked for."""
    tier = FaultyTier(HostTier(64 * PAGE), [Fault("fail", "relabel", calls=[1])])
    for number in range(3):
        store_object(tier, key_of(number), 100, b"old")

    done = tier.revise_labels([key_of(number) for number in range(3)], lambda _key, _old: b"new")

    assert done == [True, False, True]
    assert [item.labels for item in tier.labelled()] == [b"new", b"old", b"new"]
    assert tier.num_happened == {"relabel fail": 1}


def test_what_is_held_above_does_not_fall() -> None:
    """A tier whose only place is held refuses, and the object goes where there is room."""
    stack = stack_of_two()
    put(stack, 1, b"pin")
    assert stack.tiers[0].hold([key_of(1)]) == [True]

    assert put(stack, 2) == {0: PutOutcome.REFUSED}
    content = memoryview(content_of(key_of(3), PAGE))
    below = stack.put(key_of(3), lambda: [content], PAGE, Occasion.EVICTED, labels=b"low")

    assert below == {0: PutOutcome.REFUSED, 1: PutOutcome.STORED}
    assert stack.tiers[1].labels(key_of(3)) == b"low"
    assert stack.tiers[0].find([key_of(1)]) == [Presence.PRESENT]


def test_a_tier_whose_medium_failed_lists_what_it_knows(tmp_path: object) -> None:
    """Nobody waits for a look at files that cannot be had."""
    tier = DiskTier(f"{tmp_path}/cache", 1 << 20)
    with tier:
        store_object(tier, key_of(1), 100, b"tag")
        tier._keeper.close()
        tier._keeper._is_scanned.clear()
        tier._reads.failed(OSError(5, "on purpose"))

        assert [item.labels for item in tier.labelled()] == [b"tag"]
        assert isinstance(read_object(tier, key_of(1), 100), Miss)
