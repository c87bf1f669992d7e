"""What a tier could not delete when it was purged does not come back: not later, and not after a restart."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.config import CacheOptions
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Labelled, Tier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.wrapper import TierWrapper
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk
from tests.servers import RedisServer

PROMPT = list(range(100, 112))  # three full blocks
# More than are remembered once they are over.
OTHERS = 70
# As a server that nobody reaches: nothing is deleted, and nothing found.
DOWN = [Fault("fail", of, probability=1.0) for of in ("delete", "find", "get")]
DEAF = [*DOWN, Fault("fail", "relabel", probability=1.0)]


class Unlisted(TierWrapper):
    """A tier that does not say what it has, until it does."""

    is_silent = True

    def labelled(self) -> Iterator[Labelled]:
        if self.is_silent:
            raise TimeoutError(self.name)
        return super().labelled()


def by_tag(one: LifetimeCache) -> tuple[str, ...]:
    """Purge the tag; whom it did not reach."""
    return one.admin.purges.purge(one.query(tags=("gone",))).not_reached


def by_session(one: LifetimeCache) -> tuple[str, ...]:
    """Close the session; whom it did not reach."""
    return one.admin.close_session(one.session_id("gone")).not_reached


def computed_below(tiers: list[Tier], clock: Clock) -> LifetimeCache:
    """A cache whose tiers have the prompt, and whose device has not."""
    one = LifetimeCache(clock, tiers=tiers)
    one.serve(PROMPT, CacheOptions(tags=["gone"], session="gone"))
    one.cache.offload()
    return one


def num_computed(one: LifetimeCache) -> int:
    """How much of the prompt a request that leaves nothing has to compute."""
    return one.serve([*PROMPT, 1], CacheOptions(write=False))


def ask_again(one: LifetimeCache) -> None:
    """Have tiers that did not answer told now."""
    assert one.below is not None
    deletions = one.below.deletions
    deletions.retry_s = 0.0
    for left in deletions._left:
        left.retry_at = 0.0
    deletions.searches._retry_at = 0.0
    one.cache.poll()
    one.below.settle()
    one.cache.poll()
    one.below.settle()


def test_a_purge_stands_until_every_tier_has_heard_of_it() -> None:
    """However many others come; it is told again, and what is computed anew since lasts."""
    tier = FaultyTier(HostTier(MANY), [])
    one = computed_below([tier], Clock())
    tier.replace_faults(DOWN)
    assert by_tag(one) == (tier.name,)
    tier.replace_faults([])
    for number in range(OTHERS):
        one.admin.purges.purge(one.query(tags=(f"other-{number}",)))

    assert num_computed(one) == len(PROMPT) + 1
    ask_again(one)
    assert not list(tier.objects())
    one.serve(PROMPT, CacheOptions())
    one.cache.offload()
    assert num_computed(one) == 1
    one.cache.close()


def test_a_receipt_names_those_that_did_not_answer() -> None:
    """And nobody once they did."""
    tier = FaultyTier(HostTier(MANY), DOWN)
    one = computed_below([tier], Clock())
    purge = one.admin.purges.begin(one.query(tags=("gone",)))

    assert purge.wait().not_reached == (tier.name,)
    ask_again(one)
    assert purge.receipt().not_reached == (tier.name,)
    tier.replace_faults([])
    ask_again(one)
    assert purge.receipt().not_reached == ()
    one.cache.close()


@pytest.mark.parametrize("forget", [by_tag, by_session])
def test_a_server_that_was_away_is_told_after_a_restart(
    tmp_path: Path, forget: Callable[[LifetimeCache], tuple[str, ...]]
) -> None:
    """The journal of a disk knows what it has yet to hear."""
    clock = Clock()
    with RedisServer(tmp_path / "redis") as server:
        wire = FaultyTier(RespTier(server.url, timeout_s=20.0), [])
        first = computed_below([disk(tmp_path / "disk"), wire], clock)
        first.admin.purges.begin(first.query(tiers=("disk", "device"), everything=True)).wait()
        wire.replace_faults(DOWN)
        assert forget(first) == (wire.name,)
        first.cache.close()
        again: list[Tier] = [disk(tmp_path / "disk"), RespTier(server.url, timeout_s=20.0)]
        second = LifetimeCache(clock, tiers=again, before=first)

        assert num_computed(second) == len(PROMPT) + 1
        assert second.below is not None
        second.below.settle()
        assert not list(again[1].objects())
        second.cache.close()


def test_a_tag_that_no_tier_heard_of_counts_all_the_same() -> None:
    """What a tier says of a block it did not hear of may be old."""
    tier = FaultyTier(HostTier(MANY), [Fault("fail", "relabel", probability=1.0)])
    one = LifetimeCache(Clock(), tiers=[tier])
    one.serve(PROMPT, CacheOptions())
    one.cache.offload()
    one.serve(PROMPT, CacheOptions(tags=["gone"]))
    tier.replace_faults(DEAF)
    assert by_tag(one) == (tier.name,)
    tier.replace_faults([])

    assert num_computed(one) == len(PROMPT) + 1
    ask_again(one)
    assert not list(tier.objects())
    one.cache.close()


def test_what_two_sessions_shared_goes_though_no_tier_heard_of_either(tmp_path: Path) -> None:
    """Its labels there say what neither closing alone means."""
    clock = Clock()
    with RedisServer(tmp_path / "redis") as server:
        wire = FaultyTier(RespTier(server.url, timeout_s=20.0), [])
        first = computed_below([disk(tmp_path / "disk"), wire], clock)
        first.serve(PROMPT, CacheOptions(session="other"))
        first.cache.offload()
        assert first.below is not None
        first.below.relabels.make_all_due()
        first.cache.poll()
        first.below.settle()
        wire.replace_faults(DEAF)
        by_session(first)
        first.admin.close_session(first.session_id("other"))
        first.cache.close()
        again: list[Tier] = [disk(tmp_path / "disk"), RespTier(server.url, timeout_s=20.0)]
        second = LifetimeCache(clock, tiers=again, before=first)

        assert num_computed(second) == len(PROMPT) + 1
        second.cache.close()


def test_a_tier_that_did_not_say_what_it_has_is_looked_through_once_it_does() -> None:
    """It has blocks of another machine, of which nothing is known here."""
    inner, clock = HostTier(MANY), Clock()
    other = computed_below([inner], clock)
    tier = Unlisted(inner)
    one = LifetimeCache(clock, tiers=[tier], before=other)
    purge = one.admin.purges.begin(one.query(tags=("gone",)))

    assert purge.wait().not_reached == (tier.name,)
    ask_again(one)
    assert purge.receipt().not_reached == (tier.name,)
    tier.is_silent = False
    ask_again(one)
    receipt = purge.receipt()
    assert (receipt.not_reached, receipt.deleted) == ((), 3)
    assert not list(tier.objects())
    other.cache.close()
    one.cache.close()
