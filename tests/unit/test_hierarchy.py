"""Blocks on their way between the device and tiers that fail, hang, answer late or are asked to forget."""

from collections.abc import Iterator, Sequence
from threading import Event
from time import monotonic, sleep

import pytest

from kvkeep.cache import Hierarchy, KVCache
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.scheduling import Request, Scheduler
from kvkeep.spec import RequestId, StoredKey
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Occasion, Tier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.stack import Floor, TierStack
from tests.content_store import CheckedCache, ContentStore, full, sliding, spec_of

ALL = frozenset(Occasion)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]


def host(num_objects: int = 100, name: str = "host") -> HostTier:
    """Memory for so many objects."""
    return HostTier(num_objects * 2**13, name=name)


def over(*tiers: Tier, room: int = 16, write_on: frozenset[Occasion] = ALL) -> CheckedCache:
    """A cache of one group over tiers."""
    floors = [Floor(tier, write_on) for tier in tiers]
    return CheckedCache(spec_of(full()), [room], floors=floors)


@pytest.fixture
def opened() -> Iterator[list[CheckedCache]]:
    """Caches that are closed at the end."""
    caches: list[CheckedCache] = []
    yield caches
    for checked in caches:
        checked.cache.close()


def test_what_is_evicted_goes_down_first_and_comes_back(opened: list[CheckedCache]) -> None:
    """A device of four blocks serves prompts that need three each, and forgets nothing."""
    checked = over(host(), room=4, write_on=frozenset({Occasion.EVICTED}))
    opened.append(checked)
    prompts = [[number] * 12 for number in range(5)]
    for prompt in prompts:
        checked.warm(prompt)
    for prompt in prompts:
        assert checked.gaps_of([*prompt, 0]) == [(12, 13)]
        lease = checked.begin([*prompt, 0])
        assert lease.gaps[0].start == 12
        lease.release()


def test_a_load_that_fails_is_a_gap_and_what_lies_behind_is_kept(
    opened: list[CheckedCache],
) -> None:
    """The third of the loads fails: four tokens are computed again, the receipt has the cause."""
    tier = FaultyTier(host(), [Fault("fail", "get", calls=[1])])
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    chain = checked.chain(PROMPT)
    lookup = checked.cache.look_up(chain)

    lease = checked.cache.reserve(chain, lookup=lookup)
    assert lease is not None
    checked.settle()

    assert list(lease.failed.values()) == ["unavailable"]
    assert len(lease.loaded) == 2
    checked.cache.avoid_failed(lease, lookup)
    lease.release()
    again = checked.cache.reserve(chain, lookup=lookup)
    assert again is not None
    checked.check_lease(again)
    assert sum(map(len, again.gaps)) == 4 + 1
    again.release()


def test_a_load_that_hangs_is_given_up_and_harms_nobody_when_it_comes(
    opened: list[CheckedCache],
) -> None:
    """Past its deadline the block is computed; what the hanging thread writes later is in nobody's place."""
    tier = FaultyTier(host(), [Fault("hang", "get", calls=[0])])
    now_s = [0.0]
    spec = spec_of(full())
    store = ContentStore(spec, [16])
    below = Hierarchy(spec, store, TierStack([Floor(tier, ALL)]), clock=lambda: now_s[0])
    checked = over(host())
    checked.store, checked.below = store, below
    checked.cache = KVCache(spec, [16], store, below=below)
    checked.ledgers = checked.cache._ledgers
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    chain = checked.chain(PROMPT)
    lookup = checked.cache.look_up(chain)
    lease = checked.cache.reserve(chain, lookup=lookup)
    assert lease is not None
    assert not lease.runnable_gaps, "nothing can run before its beginning is there"

    now_s[0] = 1000.0
    checked.cache.poll()

    assert set(lease.failed.values()) == {"late"}
    checked.cache.avoid_failed(lease, lookup)
    lease.release()
    again = checked.cache.reserve(chain, lookup=lookup)
    assert again is not None
    assert len(again.gaps[0]) >= 4
    tier.release()
    checked.settle()
    assert checked.finish(again)
    again.release()
    checked.assert_idle()
    assert lease.restore_s == 1000.0


def test_other_requests_run_while_one_waits_for_its_blocks(opened: list[CheckedCache]) -> None:
    """The scheduler plans nothing for a request that loads, and everything for one that does not."""
    tier = FaultyTier(host(), [Fault("hang", "get", calls=range(100))])
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    scheduler = Scheduler(checked.cache, max_batch_tokens=64, max_requests=4)
    waiting, running = (
        request_of(checked, RequestId(at), tokens) for at, tokens in enumerate((PROMPT, [7, 7, 7]))
    )
    scheduler.add(waiting)
    scheduler.add(running)

    planned = scheduler.plan()

    assert [work.request for work in planned.work] == [running]
    assert scheduler.num_running == 2
    tier.release()
    checked.settle()
    assert {work.request for work in scheduler.plan().work} == {waiting, running}
    for request in (waiting, running):
        scheduler.finish(request)


def request_of(checked: CheckedCache, request_id: RequestId, tokens: Sequence[int]) -> Request:
    """A request as the engine makes it."""
    request = Request(request_id, checked.chain(tokens), SamplingParams(), CacheOptions())
    request.lookup = checked.cache.look_up(request.chain)
    return request


def test_two_requests_for_the_same_blocks_load_them_once(opened: list[CheckedCache]) -> None:
    """The second waits, and then shares."""
    tier = FaultyTier(host(), [Fault("hang", "get", calls=range(100))])
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    scheduler = Scheduler(checked.cache, max_batch_tokens=64, max_requests=4)
    first, second = (request_of(checked, RequestId(at), PROMPT) for at in range(2))
    scheduler.add(first)
    scheduler.add(second)

    scheduler.plan()

    assert (scheduler.num_running, scheduler.num_waiting) == (1, 1)
    tier.release()
    checked.settle()
    scheduler.plan()
    assert scheduler.num_running == 2
    assert checked.cache.stats().tiers[0].num_loaded == 3
    for request in (first, second):
        scheduler.finish(request)


def test_a_request_that_is_aborted_while_it_loads_leaves_what_comes_to_others(
    opened: list[CheckedCache],
) -> None:
    """The place stays held until the bytes have come; then the block is anybody's."""
    started = Event()
    tier = Slow(host(), started)
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    lease = checked.cache.reserve(checked.chain(PROMPT))
    assert lease is not None
    assert started.wait(10)

    lease.release()

    report = checked.cache.verify()
    assert report.ok, report.problems
    assert checked.cache.stats().in_use_bytes > 0
    tier.go.set()
    checked.settle()
    checked.assert_idle()


class Slow(FaultyTier):
    """A tier whose gets wait until they may go on."""

    def __init__(self, tier: Tier, started: Event) -> None:
        super().__init__(tier, [])
        self.go = Event()
        self._started = started

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> object:  # type: ignore[override]
        self._started.set()
        assert self.go.wait(10)
        return super().get(key, buffers)


def test_what_is_dropped_while_it_is_copied_does_not_come_back(
    opened: list[CheckedCache],
) -> None:
    """A put that is under way when its content is dropped leaves nothing behind."""
    tier = FaultyTier(host(), [Fault("hang", "put", calls=range(100))])
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.poll()
    chain = checked.chain(PROMPT)
    until = monotonic() + 10
    while not tier.num_hanging and monotonic() < until:
        sleep(0.001)

    checked.cache.drop(chain, range(3))
    tier.release()
    checked.settle()

    assert list(tier.objects()) == []
    assert checked.cache.coverage(chain).known_tokens == 0


def test_idle_blocks_leave_the_device_and_used_ones_stay(opened: list[CheckedCache]) -> None:
    """`idle_s` after their last use blocks are below alone."""
    floors = [Floor(host(), ALL)]
    checked = CheckedCache(spec_of(full()), [16], floors=floors, idle_s=0.0)
    opened.append(checked)
    held = checked.begin([5, 5, 5, 5, 5])
    assert checked.finish(held)
    checked.warm(PROMPT)
    for _ in range(10):
        checked.cache.poll()
        checked.settle()
    sealed = checked.ledgers[0].sealed_blocks()
    assert sealed == [held.tables[0].blocks[0]]
    assert checked.gaps_of(PROMPT) == [(12, 13)]
    held.release()


def test_a_hanging_disk_below_memory_holds_nothing_up(opened: list[CheckedCache]) -> None:
    """Requests come and go while nothing can be written to the lower tier; what fell lands when it can."""
    slow = FaultyTier(host(name="slow"), [Fault("hang", "put", calls=range(1000))])
    checked = over(host(2), slow, room=4)
    opened.append(checked)
    for number in range(20):
        serve(checked, [number] * 12)
        checked.cache.poll()
    assert checked.below is not None
    assert checked.below.stack.num_spilling > 0

    slow.release()
    checked.settle()

    assert len(list(slow.objects())) > 10
    assert checked.below.stack.num_spilling == 0


def serve(checked: CheckedCache, tokens: Sequence[int]) -> None:
    """A request that waits for nothing that is on its way down."""
    lease = checked.cache.reserve(checked.chain(tokens))
    assert lease is not None
    assert checked.finish(lease)
    lease.release()


def test_what_is_dropped_while_it_falls_does_not_land(opened: list[CheckedCache]) -> None:
    """Memory has evicted it, the tier below hangs, and then nobody wants it any more."""
    slow = FaultyTier(host(name="slow"), [Fault("hang", "put", calls=range(1000))])
    checked = over(host(3), slow, room=4, write_on=frozenset({Occasion.EVICTED}))
    opened.append(checked)
    prompts = [[number] * 12 for number in range(4)]
    for prompt in prompts:
        serve(checked, prompt)
    for prompt in prompts:
        chain = checked.chain(prompt)
        checked.cache.drop(chain, range(len(chain.keys)))

    slow.release()
    checked.settle()

    assert list(slow.objects()) == []


def test_without_a_tier_that_takes_it_nothing_leaves(opened: list[CheckedCache]) -> None:
    """A tier that refuses everything must not cost the device's copy."""
    tier = FaultyTier(host(), [Fault("fail", "put", calls=range(1000))])
    checked = over(tier)
    opened.append(checked)
    checked.warm(PROMPT)

    checked.cache.offload()

    assert checked.gaps_of(PROMPT) == [(12, 13)]
    assert checked.ledgers[0].num_sealed == 3
    copies = checked.cache.stats().copies
    assert copies is not None
    assert copies.num_failed == 2 * 3  # when the request ended, and when idle
    assert copies.num_dropped == 0


def test_what_is_lost_on_its_way_down_is_counted(opened: list[CheckedCache]) -> None:
    """More falls than may wait for a tier that hangs: each block is either there in the end, or counted."""
    slow = FaultyTier(host(400, name="slow"), [Fault("hang", "put", calls=range(1000))])
    memory = host(2)
    checked = over(memory, slow, room=4, write_on=frozenset({Occasion.EVICTED}))
    opened.append(checked)
    for number in range(60):
        serve(checked, [number] * 12)
        checked.cache.poll()
    slow.release()
    checked.settle()

    copies = checked.cache.stats().copies
    assert copies is not None
    assert copies.num_dropped > 0
    num_above = checked.ledgers[0].num_sealed + memory.stats().num_objects
    assert num_above + len(list(slow.objects())) + copies.num_dropped == 60 * 3


def test_groups_recover_together_when_one_group_cannot_load(opened: list[CheckedCache]) -> None:
    """Where a window's block is lost, full attention's is computed with it, and reads what it needs."""
    floors = [Floor(tier := host(), ALL)]
    checked = CheckedCache(spec_of(full(), sliding(6)), [16, 16], floors=floors)
    opened.append(checked)
    checked.warm(PROMPT)
    checked.cache.offload()
    chain = checked.chain(PROMPT)
    tier.delete([StoredKey(chain.keys[2] + b"\1")])

    lease = checked.begin(PROMPT)

    assert checked.finish(lease)
    lease.release()
    checked.assert_idle()


def test_closing_writes_what_is_to_survive() -> None:
    """All that is on the device lies in the tier afterwards."""
    tier = Kept(host())
    checked = over(tier, write_on=frozenset({Occasion.CLOSING}))
    checked.warm(PROMPT)
    assert list(tier.objects()) == []

    checked.cache.close()

    assert tier.num_at_close == 3


class Kept(FaultyTier):
    """A tier that says what it had when it was closed."""

    num_at_close = 0

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier, [])

    def close(self) -> None:
        self.num_at_close = len(list(self.objects()))
        super().close()
