"""Labels that change while their blocks are on the way: written, falling, or in several tiers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.blocks import stored_key
from kvkeep.cache.lifetimes import Labels, decode_labels
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.testing.tier_contents import key_of, store_object
from kvkeep.tiers.base import Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk
from tests.servers import wait_until

PROMPT = list(range(100, 112))  # three full blocks
PAGE = 4096


@pytest.fixture
def opened() -> Iterator[list[LifetimeCache]]:
    """Caches that are closed at the end."""
    caches: list[LifetimeCache] = []
    yield caches
    for checked in caches:
        checked.cache.close()


def over(opened: list[LifetimeCache], *tiers: Tier) -> LifetimeCache:
    """A cache over tiers, closed at the end."""
    opened.append(LifetimeCache(Clock(), tiers=tiers))
    return opened[-1]


def settle(checked: LifetimeCache) -> None:
    """Let what is under way end, and what follows from it."""
    for _ in range(4):
        checked.cache.poll()
        checked.settle()


def stored(checked: LifetimeCache, tier: Tier, number: int = 0) -> Labels | None:
    """The labels that a tier has of a block of the prompt."""
    key = checked.chain(PROMPT).keys[number]
    return decode_labels(tier.labels(stored_key(key, 0)) or b"")


def tagged(checked: LifetimeCache, tag: str) -> None:
    """A use of the prompt's blocks that adds a tag, and nothing else yet."""
    chain = checked.chain(PROMPT)
    claim = checked.cache.open_claim(CacheOptions(tags=[tag]), chain)
    checked.cache._upkeep.use(claim, chain, range(3), is_new=False)
    checked.cache.close_claim(claim, chain)


def test_a_put_that_lands_after_its_labels_changed_gets_the_new_ones(
    opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """It was begun with the old ones, and what was written meanwhile found nothing to write to."""
    tier = FaultyTier(disk(tmp_path), [Fault("hang", "put", calls=range(100))])
    checked = over(opened, tier)
    checked.serve(PROMPT, CacheOptions(write=True))
    lease = checked.begin([*PROMPT, 1])
    lease.release()
    checked.cache.poll()
    wait_until(lambda: tier.num_hanging, "a put hangs")

    tagged(checked, "late")
    checked.cache.poll()
    tier.release()
    settle(checked)
    checked.cache.offload()
    settle(checked)

    for number in range(3):
        labels = stored(checked, tier, number)
        assert labels is not None
        assert labels.tags == {"late"}


def test_a_put_elsewhere_does_not_hide_that_a_tier_is_behind(
    opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """New labels go with the block to one tier before they are written to the other, where it lies."""
    behind = disk(tmp_path)
    ahead = FaultyTier(HostTier(MANY), [Fault("fail", "put", calls=range(3))])
    checked = over(opened, ahead, behind)
    checked.serve(PROMPT, CacheOptions())
    settle(checked)
    assert stored(checked, behind) is not None
    assert stored(checked, ahead) is None

    tagged(checked, "late")
    assert checked.below is not None
    # The copy is queued before the labels are, and brings the new ones.
    for group, ledger in enumerate(checked.ledgers):
        for block in ledger.sealed_blocks():
            entry = ledger.entry_of(block)
            assert checked.below.copies.begin(group, block, entry, "idle", lambda: None)  # type: ignore[arg-type]
    while checked.below.copies.num_under_way:
        checked.below.wait(1.0)
        for finish in checked.below._results.take():
            finish()
    settle(checked)

    for tier in (ahead, behind):
        labels = stored(checked, tier)
        assert labels is not None
        assert labels.tags == {"late"}


class Falling:
    """A block of the prompt that falls from a full tier, and lands below when it is told to."""

    def __init__(self, opened: list[LifetimeCache], folder: Path) -> None:
        host = HostTier(3 * PAGE)
        self.above = FaultyTier(host, [])
        self.below = FaultyTier(disk(folder), [Fault("fail", "put", calls=range(3))])
        self.checked = over(opened, self.above, self.below)
        self.checked.serve(PROMPT, CacheOptions(tags=["t"]))
        settle(self.checked)
        (kept,) = host.objects()
        self.number = self.checked.chain(PROMPT).keys.index(BlockKey(kept.key[:-1]))
        self._host = host
        self._waiting: list[Callable[[], None]] = []

    def fall(self) -> None:
        """Let it begin."""
        assert self.checked.below is not None
        stack = self.checked.below.stack
        self.below.replace_faults([])
        defer, stack.defer = stack.defer, self._keep
        store_object(self._host, key_of(1), 3 * PAGE)
        stack.defer = defer
        assert self._waiting

    def land(self) -> Labels | None:
        """Let it end; the labels that it has below, if it is there."""
        for job in self._waiting:
            job()
        settle(self.checked)
        return stored(self.checked, self.below, self.number)

    def _keep(self, job: Callable[[], None]) -> bool:
        self._waiting.append(job)
        return True


def test_labels_that_change_during_a_fall_are_there_when_it_ends(
    opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """Neither tier had the object when they were written."""
    falling = Falling(opened, tmp_path)
    falling.fall()
    tagged(falling.checked, "late")
    falling.checked.cache.poll()

    labels = falling.land()

    assert labels is not None
    assert labels.tags == {"t", "late"}


def test_what_is_purged_during_a_fall_does_not_land(
    opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """Though it left the tier above just before it was to be deleted there, and came below just after."""
    falling = Falling(opened, tmp_path)
    checked = falling.checked
    falling.above.replace_faults([Fault("hang", "delete", calls=range(1000))])
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    checked.cache.poll()
    wait_until(lambda: falling.above.num_hanging, "the purge has come to the tier above")
    falling.fall()
    falling.above.release()
    purge.wait()

    assert falling.land() is None


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_block_of_low_priority_leaves_a_full_tier_first(
    opened: list[LifetimeCache], tmp_path: Path, kind: str
) -> None:
    """Though it was used last; what got a higher one since stays."""

    def tier_of(capacity_bytes: int) -> Tier:
        folder = tmp_path / str(capacity_bytes)
        is_host = kind == "host"
        return HostTier(capacity_bytes) if is_host else DiskTier(folder, capacity_bytes)

    probe = tier_of(MANY)
    checked = over(opened, probe)
    checked.serve(PROMPT, CacheOptions())
    settle(checked)
    tier = tier_of(probe.used_bytes // 3 * 10)
    checked = over(opened, tier)
    for number, priority in ((1, 10), (2, 50), (3, 10)):
        checked.serve([number] * 12, CacheOptions(priority=priority))
        settle(checked)
    checked.serve([1] * 12, CacheOptions(priority=60))
    settle(checked)

    checked.serve([4] * 12, CacheOptions())
    settle(checked)

    there = [
        sum(tier.labels(stored_key(key, 0)) is not None for key in checked.chain([n] * 12).keys)
        for n in (1, 2, 3, 4)
    ]
    assert there == [3, 3, 1, 3]
