"""Lifetimes carried out in tiers, across restarts and crashes; blocks of four tokens."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest

from kvkeep.blocks import stored_key
from kvkeep.cache import PinId
from kvkeep.cache.lifetimes import decode_labels
from kvkeep.cache.lifetimes.journal import PurgeJournal
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Got, Miss, Tier
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.wrapper import TierWrapper
from tests.content_store import full, sliding
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk

PROMPT = list(range(100, 112))  # three full blocks
OTHER = [*PROMPT[:4], *range(200, 208)]  # shares the first


@pytest.fixture
def opened() -> Iterator[list[LifetimeCache]]:
    """Caches that are closed at the end."""
    caches: list[LifetimeCache] = []
    yield caches
    for checked in caches:
        checked.cache.close()


def over(
    clock: Clock,
    opened: list[LifetimeCache],
    *tiers: Tier,
    before: LifetimeCache | None = None,
) -> LifetimeCache:
    """A cache over tiers, closed at the end."""
    checked = LifetimeCache(clock, tiers=tiers, before=before)
    opened.append(checked)
    return checked


def restart(checked: LifetimeCache, opened: list[LifetimeCache], folder: Path) -> LifetimeCache:
    """Close the cache in good order and open another one over the same folder."""
    checked.cache.close()
    opened.remove(checked)
    return over(checked.clock, opened, disk(folder), before=checked)


def num_objects(tier: Tier) -> int:
    """Objects of a tier."""
    return len(list(tier.objects()))


def labels_on(tier: Tier, key: BlockKey) -> Collection[str]:
    """The tags that a tier's labels of a block have."""
    labels = decode_labels(tier.labels(stored_key(key, 0)) or b"")
    assert labels is not None
    return labels.tags


def test_labels_go_down_with_their_block_and_follow_its_changes(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """A tag that comes later is written at once, beside everything else."""
    tier = disk(tmp_path)
    checked = over(clock, opened, tier)
    checked.serve(PROMPT, CacheOptions(tags=["one"]))
    checked.cache.offload()
    key = checked.chain(PROMPT).keys[0]
    assert labels_on(tier, key) == {"one"}

    checked.serve([*PROMPT, 5], CacheOptions(tags=["two"]))
    checked.cache.poll()
    checked.settle()

    assert labels_on(tier, key) == {"one", "two"}


def test_what_ends_is_deleted_from_tiers(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """By expiry and by purge, with the objects of each tier in the receipt."""
    tiers = (HostTier(MANY), disk(tmp_path))
    checked = over(clock, opened, *tiers)
    checked.serve(PROMPT, CacheOptions(ttl=10))
    checked.serve([1] * 12, CacheOptions(tags=["t"]))
    checked.cache.offload()
    assert [num_objects(tier) for tier in tiers] == [6, 6]
    assert checked.cache.stats().reusable_bytes == 0

    receipt = checked.admin.purges.purge(checked.query(tags=("t",)))
    assert receipt.stored == {"host": 3, "disk": 3}
    assert receipt.deleted == 3

    clock.now_s += 10
    receipt = checked.admin.purges.expire()
    assert receipt.stored == {"host": 3, "disk": 3}
    assert [num_objects(tier) for tier in tiers] == [0, 0]
    assert not any(checked.known(PROMPT))


def test_a_purge_can_mean_one_tier_only(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """The others keep what they have."""
    tiers = (HostTier(MANY), disk(tmp_path))
    checked = over(clock, opened, *tiers)
    checked.serve(PROMPT, CacheOptions(tags=["t"]))
    checked.cache.offload()

    query = checked.query(tags=("t",), tiers=("disk",))

    receipt = checked.admin.purges.purge(query)

    assert (receipt.deleted, receipt.stored) == (3, {"disk": 3})
    assert [num_objects(tier) for tier in tiers] == [3, 0]
    assert all(checked.known(PROMPT))
    for is_tried in (True, False):
        again = checked.admin.purges.purge(query, dry_run=is_tried)
        assert (again.matched, again.deleted, again.freed_bytes, again.stored) == (0, 0, 0, {})


def test_labels_survive_a_restart(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """Ends, sessions, tags and pins hold for what an earlier process computed."""
    checked = over(clock, opened, disk(tmp_path))
    checked.serve([1] * 12, CacheOptions(ttl=10))
    checked.serve([2] * 12, CacheOptions(session="a"))
    checked.serve([3] * 12, CacheOptions(tags=["t"]))
    checked.serve([4] * 12, CacheOptions(ttl=10))
    checked.admin.pin(PinId("p"), checked.chain([4] * 12))

    checked = restart(checked, opened, tmp_path)

    assert [report.name for report in checked.admin.sessions()] == ["a"]
    (pin,) = checked.admin.pins()
    assert (pin.name, pin.num_blocks) == ("p", 3)
    for number in range(1, 5):
        assert all(checked.known([number] * 12))
    clock.now_s += 10
    assert not any(checked.known([1] * 12))
    assert all(checked.known([4] * 12))
    assert checked.admin.close_session(checked.session_id("a")).stored == {"disk": 3}
    assert checked.admin.purges.purge(checked.query(tags=("t",))).stored == {"disk": 3}
    assert not any(checked.known([2] * 12) + checked.known([3] * 12))
    assert checked.serve([*[4] * 12, 1], CacheOptions()) == 1
    assert checked.admin.pins()[0].num_on_device == 3


def test_what_expired_while_nobody_ran_is_deleted_at_the_start(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """It is never served, and does not stay on the disk either."""
    checked = over(clock, opened, disk(tmp_path))
    checked.serve(PROMPT, CacheOptions(ttl=10))
    checked.cache.close()
    opened.clear()
    clock.now_s += 10
    tier = disk(tmp_path)
    assert num_objects(tier) == 3

    checked = over(clock, opened, tier)
    assert checked.admin.sessions() == []
    checked.settle()

    assert num_objects(tier) == 0
    assert not any(checked.known(PROMPT))


def test_a_block_that_expired_elsewhere_is_judged_when_it_arrives(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """Another process put it there after this one had looked; the request computes it instead."""
    tier = disk(tmp_path)
    reader = over(clock, opened, tier)
    writer = over(clock, opened, disk(tmp_path), before=reader)
    writer.serve(PROMPT, CacheOptions(ttl=10))
    writer.cache.offload()
    for key in writer.chain(PROMPT).keys:
        assert tier.labels(stored_key(key, 0)), "the reader learns of it now"
    assert key not in reader.lifetimes.register
    clock.now_s += 10

    assert reader.serve([*PROMPT, 7], CacheOptions()) == 13

    assert reader.serve([*PROMPT, 8], CacheOptions()) == 1


def test_a_purge_finds_what_other_processes_have_put(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """By the labels that lie there, though this process never saw the blocks."""
    tier = disk(tmp_path)
    reader = over(clock, opened, tier)
    writer = over(clock, opened, disk(tmp_path), before=reader)
    writer.serve(PROMPT, CacheOptions(tags=["t"]))
    writer.serve([1] * 12, CacheOptions(tags=["u"]))
    writer.cache.offload()
    for tokens in (PROMPT, [1] * 12):
        for key in writer.chain(tokens).keys:
            assert tier.labels(stored_key(key, 0))

    receipt = reader.admin.purges.purge(reader.query(tags=("t",)))

    assert receipt.stored == {"disk": 3}
    assert receipt.matched == receipt.deleted == 3
    assert num_objects(tier) == 3


def test_a_purge_that_a_crash_interrupted_is_finished_at_the_start(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """What was to go has gone before anything is served; what came later stays."""
    checked = over(clock, opened, disk(tmp_path))
    checked.serve([1] * 12, CacheOptions(tags=["t"]))
    checked.serve([2] * 12, CacheOptions(tags=["u"]))
    clock.now_s += 5
    journal = PurgeJournal(tmp_path)
    journal.begin(checked.query(tags=("t",)), clock.now_s)
    clock.now_s += 5
    checked.serve([3] * 12, CacheOptions(tags=["t"]))

    checked = restart(checked, opened, tmp_path)

    assert not any(checked.known([1] * 12))
    assert all(checked.known([2] * 12))
    assert all(checked.known([3] * 12))
    checked.cache.poll()
    checked.settle()
    assert PurgeJournal(tmp_path).unfinished() == []


def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path, clock: Clock) -> None:
    """A line that a kill cut short began no purge; the lines behind it count."""
    journal, checked = PurgeJournal(tmp_path), LifetimeCache(clock)
    finished = journal.begin(checked.query(tags=("a",)), 1.0)
    with (tmp_path / "purges.jsonl").open("ab") as file:
        file.write(b'{"v":1,"id":"x","que')
    journal.begin(checked.query(tags=("b",)), 2.0)
    journal.finish(finished)

    (left,) = PurgeJournal(tmp_path).unfinished()

    assert left.query.tags == {"b"}
    assert left.query.created_before == 2.0


def test_a_medium_without_room_for_the_journal_is_no_error(clock: Clock, tmp_path: Path) -> None:
    """The purge is done all the same."""
    journal = PurgeJournal(tmp_path / "is not there")
    journal.finish(journal.begin(LifetimeCache(clock).query(everything=True), 1.0))
    assert journal.unfinished() == []


class Late(TierWrapper):
    """A tier whose gets take their time once the bytes are read."""

    def __init__(self, tier: Tier) -> None:
        super().__init__(tier)
        self.has_read, self.may_go = Event(), Event()

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        got = super().get(key, buffers)
        self.has_read.set()
        assert self.may_go.wait(10)
        return got


def test_what_is_purged_while_it_loads_is_not_used(
    clock: Clock, opened: list[LifetimeCache]
) -> None:
    """The load comes after the purge: the request computes its blocks, and nobody finds the old ones."""
    tier = Late(HostTier(MANY))
    checked = over(clock, opened, tier)
    checked.serve(PROMPT, CacheOptions(tags=["t"]))
    checked.cache.offload()
    lease = checked.cache.reserve(checked.chain([*PROMPT, 1]))
    assert lease is not None
    assert tier.has_read.wait(10)

    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    tier.may_go.set()
    assert purge.wait().matched == 3
    checked.settle()

    assert "invalidated" in lease.failed.values()
    assert len(lease.failed) == 3
    lease.release()
    assert not any(checked.known(PROMPT))
    checked.assert_idle()


def test_nothing_comes_between_a_purge_and_its_end(
    clock: Clock, opened: list[LifetimeCache]
) -> None:
    """While a tier still deletes, what is computed anew is kept, and is not deleted with the old."""
    tier = FaultyTier(HostTier(MANY), [Fault("hang", "delete", calls=range(100))])
    checked = over(clock, opened, tier)
    checked.serve(PROMPT, CacheOptions(tags=["t"]))
    checked.cache.offload()
    purge = checked.admin.purges.begin(checked.query(tags=("t",)))
    assert not purge.is_done
    assert not any(checked.known(PROMPT))

    checked_lease = checked.cache.reserve(checked.chain([*PROMPT, 1]))
    assert checked_lease is not None
    assert checked.finish(checked_lease)
    checked_lease.release()
    checked.cache.poll()
    assert all(checked.known(PROMPT))
    tier.release()
    assert purge.wait().stored == {"host": 3}

    assert all(checked.known(PROMPT))
    checked.cache.offload()
    assert num_objects(tier) == 3
    assert all(checked.known(PROMPT))


def test_another_context_moves_down_at_once(clock: Clock, opened: list[LifetimeCache]) -> None:
    """What only the old context used leaves the device; the rest stays."""
    tier = HostTier(MANY)
    checked = over(clock, opened, tier)
    checked.serve(PROMPT, CacheOptions(session="a", context="work"))
    checked.serve(OTHER, CacheOptions(session="a", context="home"))
    for _ in range(3):
        checked.cache.poll()
        checked.settle()

    chain, ledger = checked.chain(PROMPT), checked.ledgers[0]
    assert [ledger.get(key) is not None for key in chain.keys] == [True, False, False]
    assert all(checked.known(PROMPT))
    assert all(ledger.get(key) is not None for key in checked.chain(OTHER).keys)


def test_labels_of_what_lies_nowhere_are_forgotten(
    clock: Clock, opened: list[LifetimeCache]
) -> None:
    """With and without tiers the register does not outgrow what there is."""
    for tiers in ((), (HostTier(4096 * 40),)):
        checked = LifetimeCache(clock, tiers=tiers, room=8)
        if tiers:
            opened.append(checked)
        for number in range(2500):
            checked.serve([number] * 8, CacheOptions(tags=["t"]))
            checked.cache.poll()
        assert len(checked.lifetimes.register) < 4096 + 512
        if not tiers:
            assert len(checked.lifetimes.register) == checked.ledgers[0].num_sealed
        assert checked.cache.verify().ok


def test_windows_and_their_groups_are_forgotten_together(
    clock: Clock, opened: list[LifetimeCache], tmp_path: Path
) -> None:
    """One label for all groups of a block: a purge takes the parts of each."""
    checked = LifetimeCache(clock, tiers=[disk(tmp_path)], groups=(full(), sliding(6)))
    opened.append(checked)
    checked.serve(PROMPT, CacheOptions(tags=["t"]))
    checked.cache.offload()
    checked.serve([*PROMPT, 5], CacheOptions())

    receipt = checked.admin.purges.purge(checked.query(tags=("t",)))

    assert receipt.matched == 3
    assert receipt.stored["disk"] == 6
    assert not any(checked.known(PROMPT))
    checked.assert_idle()
