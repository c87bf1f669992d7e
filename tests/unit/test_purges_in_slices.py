"""Purges that take more than a step: nothing that is meant is served from the first moment on."""

from collections.abc import Iterator

import pytest

from kvkeep.blocks import stored_key
from kvkeep.cache import PinId
from kvkeep.cache.lifetimes import decode_labels
from kvkeep.config import CacheOptions
from kvkeep.tiers.host import HostTier
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache

NUM_CHAINS = 20
TAGGED = CacheOptions(tags=["t"])


@pytest.fixture(autouse=True)
def one_slice_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every poll looks at four blocks, and for labels of blocks that lie nowhere."""
    monkeypatch.setattr("kvkeep.cache.upkeep._FEWEST_PRUNED", 1)
    monkeypatch.setattr("kvkeep.cache.forgetting._SLICE", 4)
    monkeypatch.setattr("kvkeep.cache.forgetting._BUSY_S", 0.0)
    monkeypatch.setattr("kvkeep.cache.forgetting._IDLE_S", 0.0)


@pytest.fixture
def checked(request: pytest.FixtureRequest) -> Iterator[LifetimeCache]:
    """A cache of twenty tagged chains, each served at a time of its own, and one without tag."""
    clock = Clock()
    tiers = [HostTier(MANY)] if getattr(request, "param", False) else []
    checked = LifetimeCache(clock, tiers=tiers)
    for number in range(NUM_CHAINS):
        clock.now_s += 1
        checked.serve(prompt(number), TAGGED)
    checked.serve(prompt(99), CacheOptions())
    yield checked
    checked.cache.close()


WITH_TIER = pytest.mark.parametrize("checked", [True], indirect=True)


def prompt(number: int) -> list[int]:
    """Three full blocks."""
    return [number] * 12


def known_chains(checked: LifetimeCache) -> set[int]:
    """Chains of which a request would find something."""
    return {number for number in (*range(NUM_CHAINS), 99) if any(checked.known(prompt(number)))}


def compute(checked: LifetimeCache, tokens: list[int], options: CacheOptions) -> None:
    """A request between two polls."""
    chain = checked.chain(tokens)
    claim = checked.cache.open_claim(options, chain)
    lease = checked.cache.reserve(chain, claim=claim)
    assert lease is not None
    assert checked.finish(lease)
    lease.release()
    checked.cache.close_claim(claim, chain)


def test_nothing_is_served_from_the_moment_that_a_purge_begins(checked: LifetimeCache) -> None:
    """At every point between its beginning and its end; the rest is served all the time."""
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    num_polls = 0
    while not purge.is_done:
        assert known_chains(checked) == {99}
        assert checked.admin.purges.purge(checked.query(tags=("t",)), dry_run=True).matched == 0
        assert checked.admin.blocks(checked.query(tags=("t",))) == []
        assert checked.cache.verify().ok
        checked.cache.poll(is_busy=True)
        num_polls += 1

    assert num_polls > 10
    assert known_chains(checked) == {99}
    assert purge.receipt().deleted == 3 * NUM_CHAINS
    checked.assert_idle()


def test_what_is_computed_anew_meanwhile_stays(checked: LifetimeCache) -> None:
    """Under the same labels, at the same time, before and after its turn has come."""
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    anew = set()
    for number in range(NUM_CHAINS):
        assert checked.serve(prompt(number), TAGGED) == 12
        anew.add(number)
        assert known_chains(checked) == {*anew, 99}
        checked.cache.poll(is_busy=True)
    receipt = purge.wait()

    assert known_chains(checked) == {*range(NUM_CHAINS), 99}
    assert receipt.deleted == 3 * NUM_CHAINS
    again = checked.admin.purges.purge(checked.query(tags=("t",)))
    assert again.deleted == 3 * NUM_CHAINS
    checked.assert_idle()


@WITH_TIER
def test_what_tiers_have_of_it_goes_before_it_is_put_anew(checked: LifetimeCache) -> None:
    """An object never bears labels of a purge that its block has outlived."""
    checked.cache.offload()
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    for number in range(NUM_CHAINS):
        compute(checked, prompt(number), CacheOptions(tags=["u"]))
    receipt = purge.wait()
    checked.settle()

    assert receipt.stored == {"host": 3 * NUM_CHAINS}
    assert receipt.deleted == 3 * NUM_CHAINS
    checked.cache.offload()
    assert known_chains(checked) == {*range(NUM_CHAINS), 99}
    assert checked.below is not None
    (tier,) = checked.below.stack.tiers
    for number in range(NUM_CHAINS):
        key = checked.chain(prompt(number)).keys[0]
        labels = decode_labels(tier.labels(stored_key(key, 0)) or b"")
        assert labels is not None
        assert labels.tags == {"u"}


def test_who_holds_a_block_does_not_bring_it_back(checked: LifetimeCache) -> None:
    """Not by letting go of it, which puts off its end, nor by using it once more."""
    chain = checked.chain([*prompt(3), 1])
    claim = checked.cache.open_claim(CacheOptions(ttl=1000), chain)
    lease = checked.cache.reserve(chain, claim=claim)
    assert lease is not None
    assert lease.reused_tokens == 12
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    lease.release()
    checked.cache.close_claim(claim, chain)
    assert known_chains(checked) == {99}

    assert purge.wait().deleted == 3 * NUM_CHAINS
    assert known_chains(checked) == {99}
    checked.assert_idle()


def test_pins_of_what_is_being_purged_go_with_it(checked: LifetimeCache) -> None:
    """And keep nothing that is computed anew meanwhile."""
    checked.admin.pin(PinId("p"), checked.chain(prompt(19)))
    purge = checked.admin.purges.begin(checked.query(tags=("t",), include_pinned=True))
    checked.serve(prompt(19), CacheOptions())

    receipt = purge.wait()

    assert (receipt.deleted, receipt.skipped_pinned) == (3 * NUM_CHAINS, 0)
    assert known_chains(checked) == {19, 99}
    assert [report.num_blocks for report in checked.admin.pins()] == [0]
    checked.assert_idle()


@WITH_TIER
def test_an_expiry_of_many_blocks_takes_many_steps(checked: LifetimeCache) -> None:
    """What has expired is counted once, and goes from tiers although labels are pruned meanwhile."""
    for number in range(NUM_CHAINS):
        checked.serve([50 + number] * 12, CacheOptions(ttl=10, ttl_counts_from="first"))
    checked.cache.offload()
    checked.clock.now_s += 10
    num_before = len(checked.lifetimes.register)
    checked.cache.poll(is_busy=True)
    assert num_before - len(checked.lifetimes.register) <= 8
    assert not any(any(checked.known([50 + number] * 12)) for number in range(NUM_CHAINS))
    for _ in range(40):
        checked.cache.poll(is_busy=True)
    checked.settle()

    assert known_chains(checked) == {*range(NUM_CHAINS), 99}
    assert checked.below is not None
    assert len(list(checked.below.stack.tiers[0].objects())) == 3 * (NUM_CHAINS + 1)
    assert checked.admin.purges.expire().matched == 0
