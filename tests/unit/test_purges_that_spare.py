"""What purges spare: newer versions than those that they are for, and what others use by now."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.cache import Query
from kvkeep.cache.lifetimes.journal import PurgeJournal
from kvkeep.config import CacheOptions
from kvkeep.tiers.base import Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier
from tests.lifetime_books import Clock, root
from tests.lifetime_cache import MANY, LifetimeCache, disk
from tests.unit.test_purges_out_of_reach import Unlisted, ask_again

PROMPT = list(range(100, 112))  # three full blocks
OTHER = [*PROMPT[:4], *range(200, 208)]  # shares the first
NUM_BLOCKS = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a disk tier."""
    return tmp_path


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Purges that can wait for others to look through tiers with do."""
    monkeypatch.setattr("kvkeep.cache.searches._PATIENCE_S", 1000.0)


def outdating(tier: Tier) -> LifetimeCache:
    """A block that depends on nothing, and a purge of all versions but the first that has yet to look."""
    checked = LifetimeCache(Clock(), tiers=[tier])
    checked.serve(PROMPT, CacheOptions())
    checked.clock.now_s += 1
    checked.serve([1], CacheOptions(tags=["f@1"]))
    return checked


def overtake(checked: LifetimeCache) -> None:
    """What was computed first depends on version 2 now."""
    checked.clock.now_s += 1
    checked.serve(PROMPT, CacheOptions(tags=["f@2"]))
    checked.cache.offload()
    checked.settle()


def look_now(checked: LifetimeCache) -> None:
    """Have all that waits look through tiers: it goes along with a purge that cannot wait."""
    checked.admin.purges.purge(checked.query(tags=("nobody's",)))


@pytest.fixture
def over_disk(folder: Path) -> Iterator[tuple[LifetimeCache, DiskTier]]:
    """A cache overtaken by a newer version, and its disk."""
    tier = disk(folder)
    checked = outdating(tier)
    overtake(checked)
    yield checked, tier
    checked.cache.close()


def test_a_newer_version_is_spared_by_the_search_of_an_older_one(
    over_disk: tuple[LifetimeCache, DiskTier],
) -> None:
    """It lies where it lay."""
    checked, tier = over_disk

    look_now(checked)

    assert len(list(tier.objects())) == NUM_BLOCKS
    assert checked.serve([*PROMPT, 1], CacheOptions(write=False)) == 1


def test_a_newer_version_is_spared_after_a_restart(
    over_disk: tuple[LifetimeCache, DiskTier], folder: Path
) -> None:
    """Purges that were not over go on, and know which of them came last."""
    before, _ = over_disk
    before.cache.close()
    assert len(PurgeJournal(folder).unfinished()) == 2

    checked = LifetimeCache(before.clock, tiers=[disk(folder)], before=before)

    assert checked.serve([*PROMPT, 1], CacheOptions(write=False)) == 1
    checked.cache.close()


def test_a_newer_version_is_spared_where_nobody_answered(folder: Path) -> None:
    """A tier that shows nothing is looked through later, for what is old by then."""
    tier = Unlisted(disk(folder))
    checked = outdating(tier)
    look_now(checked)
    overtake(checked)
    tier.is_silent = False

    ask_again(checked)

    assert checked.admin.purges.purge(checked.query(tags=("nobody's",))).not_reached == ()
    assert len(list(tier.objects())) == NUM_BLOCKS
    checked.cache.close()


def versions(*tags: str, salt: str = "") -> Query:
    """What a request with these tags outdates."""
    return Query(versions=frozenset(tags), namespaces=frozenset((root(salt),)))


def test_the_journal_tells_older_purges_of_newer_versions(folder: Path) -> None:
    """Of the same name and tenant, whether that purge is over or not, and when the journal is shortened."""
    journal = PurgeJournal(folder)
    journal.begin(versions("f@1", "g@1"), 1.0)
    journal.begin(versions("f@1", salt="x"), 2.0)
    journal.finish(journal.begin(versions("f@2"), 3.0))
    many = Query(tags=frozenset({"t" * 1000}))
    for _ in range(70):
        journal.finish(journal.begin(many, 4.0))
    assert (folder / "purges.jsonl").stat().st_size < 60_000, "it was not shortened"

    first, second = PurgeJournal(folder).unfinished()

    assert first.query.versions == {"f@2", "g@1"}
    assert first.query.created_before == 1.0
    assert second.query.versions == {"f@1"}


def test_what_others_use_by_now_stays_though_a_tier_does_not_say_so_yet(folder: Path) -> None:
    """A new user is written down when there is time; the session that had it alone may end before."""
    tiers = (HostTier(MANY), disk(folder))
    checked = LifetimeCache(Clock(), tiers=tiers)
    checked.admin.purges.wait_until_restored()
    checked.serve(PROMPT, CacheOptions(session="a"))
    checked.serve(OTHER, CacheOptions(session="a"))
    checked.cache.offload()
    for options in (CacheOptions(session="b"), CacheOptions()):
        checked.serve(PROMPT, options)
    # Its places are taken by others; what it was loaded from has it still.
    checked.cache.offload()
    assert checked.below is not None
    assert checked.below.relabels.num_pending

    receipt = checked.admin.purges.purge(checked.query(sessions=("a",)))

    assert (receipt.matched, receipt.deleted) == (2, 2)
    assert receipt.stored == {"host": 2, "disk": 2}
    assert [len(list(tier.objects())) for tier in tiers] == [3, 3]
    assert checked.serve([*PROMPT, 1], CacheOptions(write=False)) == 1
    checked.cache.close()
