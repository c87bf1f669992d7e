"""A metered tier counts what passes and changes nothing."""

import math
from collections.abc import Iterator
from threading import Thread

import pytest

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Miss, MissCause, Occasion, Presence, PutOutcome
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.metered import LATENCY_BOUNDS_S, Metered, Operation, OperationMeter
from kvkeep.tiers.stack import Floor, SpillingTier, TierStack

KEY = StoredKey(b"k" * 33)
OTHER = StoredKey(b"o" * 33)


PAGE = 4096


def host() -> HostTier:
    """A tier with room for a few objects."""
    return HostTier(16 * PAGE)


class FakeClock:
    """Every look at it takes the next of `steps` seconds, then 0."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.now = 100.0

    def __call__(self) -> float:
        """Seconds."""
        self.now += self.steps.pop(0) if self.steps else 0.0
        return self.now


def part(content: bytes) -> list[memoryview]:
    """One part."""
    return [memoryview(content)]


def of(tier: Metered, operation: Operation) -> OperationMeter:
    """One operation's counters."""
    return tier.meter.operations[operation]


def test_gets_and_puts_count_bytes_seconds_and_outcomes() -> None:
    """Only what arrived, or is kept, counts as bytes; every outcome counts under its cause."""
    clock = FakeClock()
    tier = Metered(host(), clock=clock)
    clock.steps = [0, 0.5, 0, 0.25, 0, 2.0, 0, 0.125, 0, 0.125]

    assert tier.put(KEY, part(b"12345"), 5) is PutOutcome.STORED
    assert tier.put(KEY, part(b"12345"), 5) is PutOutcome.PRESENT
    assert tier.get(KEY, [memoryview(bytearray(5))]) == Got(5)
    assert isinstance(tier.get(KEY, [memoryview(bytearray(4))]), Miss)
    assert isinstance(tier.get(OTHER, [memoryview(bytearray(4))]), Miss)

    puts, gets = of(tier, Operation.PUT), of(tier, Operation.GET)
    assert (puts.num_calls, puts.num_bytes, puts.total_s) == (2, 5, 0.75)
    assert puts.outcomes == {"stored": 1, "present": 1}
    assert (gets.num_calls, gets.num_bytes, gets.total_s) == (3, 5, 2.25)
    assert gets.outcomes == {"got": 1, "short": 1, "absent": 1}
    assert gets.mean_s == 0.75


def test_finds_and_deletes_count_objects() -> None:
    """One call about several keys is one call and as many outcomes."""
    tier = Metered(host())
    tier.put(KEY, part(b"1"), 1)

    assert tier.find([KEY, OTHER, OTHER]) == [Presence.PRESENT, Presence.ABSENT, Presence.ABSENT]
    assert tier.delete([KEY, OTHER]) == 1

    assert of(tier, Operation.FIND).num_calls == 1
    assert of(tier, Operation.FIND).outcomes == {"present": 1, "absent": 2}
    assert of(tier, Operation.DELETE).outcomes == {"deleted": 1, "absent": 1}


def test_labels_and_quarantine_pass_through_and_are_counted() -> None:
    """A tier without quarantine forgets what is put aside."""
    tier = Metered(host())
    tier.put(KEY, part(b"1"), 1)

    assert tier.relabel(KEY, b"tag")
    assert not tier.relabel(OTHER, b"tag")
    assert tier.labels(KEY) == b"tag"
    tier.quarantine(KEY, "corrupt: a test")

    assert tier.find([KEY]) == [Presence.ABSENT]
    assert of(tier, Operation.RELABEL).outcomes == {"done": 1, "absent": 1}
    assert of(tier, Operation.QUARANTINE).num_calls == 1


def test_a_put_that_raises_is_counted_and_passed_on() -> None:
    """The parts' own exception arrives unchanged."""

    def broken() -> Iterator[memoryview]:
        yield memoryview(b"1")
        raise ZeroDivisionError

    tier = Metered(host())

    with pytest.raises(ZeroDivisionError):
        tier.put(KEY, broken(), 2)

    assert of(tier, Operation.PUT).outcomes == {"raised": 1}
    assert of(tier, Operation.PUT).num_bytes == 0


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (1e-6, 0), (1.5e-6, 1), (2e-6, 1), (1e-3, 10), (67.0, 26), (68.0, 27)],
)
def test_a_call_falls_in_the_first_bucket_whose_bound_it_does_not_pass(
    seconds: float, bucket: int
) -> None:
    """Bounds are fixed: two meters can be added entry by entry."""
    clock = FakeClock()
    clock.now = 0.0
    tier = Metered(host(), clock=clock)
    clock.steps = [0, seconds]

    tier.find([])

    histogram = of(tier, Operation.FIND).histogram
    assert len(histogram) == len(LATENCY_BOUNDS_S) + 1
    assert [at for at, count in enumerate(histogram) if count] == [bucket]


def test_quantiles_are_bounds_of_buckets() -> None:
    """None before the first call, infinite where no bound is."""
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    counts[3], counts[10], counts[-1] = 90, 9, 1
    meter = OperationMeter(
        num_calls=100, num_bytes=0, total_s=1.0, histogram=tuple(counts), outcomes={}
    )
    none = OperationMeter(num_calls=0, num_bytes=0, total_s=0, histogram=(0,) * 28, outcomes={})

    assert meter.quantile_s(0) == LATENCY_BOUNDS_S[3]
    assert meter.quantile_s(0.9) == LATENCY_BOUNDS_S[3]
    assert meter.quantile_s(0.91) == LATENCY_BOUNDS_S[10]
    assert meter.quantile_s(1) == math.inf
    assert none.quantile_s(0.5) is None
    assert none.mean_s is None


def test_a_snapshot_does_not_change() -> None:
    """What was read stays what it was while the tier goes on."""
    tier = Metered(host())
    before = tier.meter

    tier.put(KEY, part(b"1"), 1)

    assert before.operations[Operation.PUT].num_calls == 0
    assert before.operations[Operation.PUT].outcomes == {}
    assert tier.meter.operations[Operation.PUT].num_calls == 1


def test_calls_of_several_threads_are_all_counted() -> None:
    """No increment is lost."""
    tier = Metered(host())

    def look() -> None:
        for _ in range(500):
            tier.find([KEY])

    threads = [Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert of(tier, Operation.FIND).num_calls == 2000
    assert sum(of(tier, Operation.FIND).histogram) == 2000
    assert of(tier, Operation.FIND).outcomes == {"absent": 2000}


def test_what_a_wrapped_tier_evicts_still_falls_down() -> None:
    """A stack finds the tier's spill through the wrapper."""
    above, below = HostTier(PAGE), host()
    every = frozenset(Occasion)
    stack = TierStack([Floor(Metered(above), every), Floor(Metered(below), every)])

    stack.put(KEY, lambda: part(b"1234"), 4, Occasion.FINISHED)
    below.delete([KEY])
    stack.put(OTHER, lambda: part(b"5678"), 4, Occasion.FINISHED)

    assert above.find([KEY, OTHER]) == [Presence.ABSENT, Presence.PRESENT]
    assert below.find([KEY, OTHER]) == [Presence.PRESENT, Presence.PRESENT]


def test_a_tier_that_shows_no_evictions_takes_no_spill() -> None:
    """A stack sees that there is nothing to set: not every medium knows what goes."""

    class Silent(HostTier):
        """Has no attribute of that name."""

        def __init__(self) -> None:
            super().__init__(PAGE)
            del self.on_evict

    silent, spilling = Metered(Silent()), Metered(Metered(host()))

    assert [isinstance(tier, SpillingTier) for tier in (silent, spilling)] == [False, True]


def test_the_wrapper_is_the_tier_to_everyone_else() -> None:
    """Name, capabilities, sizes and contents are those of the tier inside."""
    inner = host()
    tier = Metered(inner)
    tier.put(KEY, part(b"123"), 3)

    assert tier.name == inner.name
    assert tier.capabilities is inner.capabilities
    assert (tier.capacity_bytes, tier.used_bytes) == (16 * PAGE, PAGE)
    assert [item.key for item in tier.objects()] == [KEY]
    assert tier.stats() == inner.stats()
    assert tier.meter.name == inner.name
    with tier:
        pass
    assert tier.get(KEY, [memoryview(bytearray(3))]) == Miss(MissCause.UNAVAILABLE, "closed")
