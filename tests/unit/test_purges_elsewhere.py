"""Purges that end of themselves look into tiers too: blocks of other machines and of earlier runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.blocks import stored_key
from kvkeep.config import CacheOptions
from kvkeep.tiers.base import Labelled
from tests.content_store import full
from tests.lifetime_cache import LifetimeCache, disk
from tests.machines import Machines
from tests.servers import RedisServer

SIZE = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for all tests of this file."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def machines(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machines]:
    """None yet; their passes over tiers do not wait for one another."""
    monkeypatch.setattr("kvkeep.cache.searches._PATIENCE_S", 0.0)
    monkeypatch.setattr("kvkeep.cache.searches._REST_PER_PASS", 0.0)
    machines = Machines(server, f"kvkeep-test:{tmp_path.name}:")
    yield machines
    machines.close()


def prompt(number: int) -> list[int]:
    """Three full blocks."""
    return [number] * 3 * SIZE


def quiet(checked: LifetimeCache) -> None:
    """Let all that is under way come to its end."""
    for _ in range(3):
        checked.cache.poll()
        checked.settle()


def test_a_new_version_finds_what_another_machine_made_of_the_old_one(machines: Machines) -> None:
    """Of the same tenant, though this machine has never seen the old version."""
    first, second = machines.start(), machines.start()
    first.serve(prompt(1), CacheOptions(tags=["f@3"]))
    first.serve(prompt(2), CacheOptions(tags=["f@3"], salt="x"))
    first.serve(prompt(3), CacheOptions(tags=["g@3"]))
    first.cache.offload()
    machines.clock.now_s += 1
    first.serve(prompt(4), CacheOptions(tags=["f@4"]))
    first.cache.offload()
    machines.clock.now_s += 1

    second.serve(prompt(5), CacheOptions(tags=["f@4"]))
    quiet(second)

    assert machines.num_objects() == 9 + 3
    assert second.serve(prompt(2), CacheOptions(salt="x", write=False)) == 1
    assert second.serve(prompt(3), CacheOptions(write=False)) == 1
    assert second.serve(prompt(4), CacheOptions(write=False)) == 1
    assert second.serve(prompt(1), CacheOptions(write=False)) == 12


def test_all_parts_of_a_block_of_others_go(machines: Machines, tmp_path: Path) -> None:
    """Those of every group, in every tier; the block counts once."""
    folders = (tmp_path / "one", tmp_path / "two")
    groups = (full("a"), full("b"))
    reader = LifetimeCache(machines.clock, tiers=list(map(disk, folders)), groups=groups)
    writer = LifetimeCache(machines.clock, tiers=list(map(disk, folders)), groups=groups)
    try:
        reader.admin.purges.wait_until_restored()
        writer.serve(prompt(1), CacheOptions(tags=["t"]))
        writer.cache.offload()
        assert reader.below is not None
        for tier in reader.below.stack.tiers:
            for key in writer.chain(prompt(1)).keys:
                # Asked for, it learns of what others have put.
                assert tier.labels(stored_key(key, 0))
                assert tier.labels(stored_key(key, 1))

        receipt = reader.admin.purges.purge(reader.query(tags=("t",)))

        assert receipt.matched == receipt.deleted == 3
        assert receipt.stored == {"disk": 12}
        # Who opens them now may read of some that are gone: the writer's index is behind.
        blocks = [one for folder in folders for one in (folder / "objects").rglob("*")]
        assert not [one for one in blocks if one.is_file()]
    finally:
        reader.cache.close()
        writer.cache.close()


def outdating(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> LifetimeCache:
    """A machine with a newer version than another has stored, of which no tier has heard yet."""
    monkeypatch.setattr("kvkeep.cache.searches._PATIENCE_S", 1000.0)
    first, second = machines.start(), machines.start()
    first.serve(prompt(1), CacheOptions(tags=["f@3"]))
    first.cache.offload()
    machines.clock.now_s += 1
    second.serve([9], CacheOptions(tags=["f@4"]))
    return second


def test_until_tiers_are_looked_through_what_comes_is_checked(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old version is not served although it lies there still, and goes when it is asked for."""
    second = outdating(machines, monkeypatch)
    quiet(second)
    num_before = machines.num_objects()

    assert second.serve([*prompt(1), 1], CacheOptions(write=False)) == 13

    quiet(second)
    assert machines.num_objects() == num_before - 3


def test_one_pass_serves_many_purges(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that can wait do, and go along with one that cannot."""
    monkeypatch.setattr("kvkeep.cache.searches._PATIENCE_S", 1000.0)
    first, second = machines.start(), machines.start()
    for number in range(5):
        first.serve(prompt(number), CacheOptions(tags=[f"f{number}@1"]))
    first.serve(prompt(9), CacheOptions(tags=["t"]))
    first.cache.offload()
    machines.clock.now_s += 1
    assert second.below is not None
    tier, passes = second.below.stack.tiers[0], list[int]()
    labelled = tier.labelled

    def counted() -> Iterator[Labelled]:
        passes.append(1)
        return labelled()

    monkeypatch.setattr(tier, "labelled", counted)
    for number in range(5):
        options = CacheOptions(tags=[f"f{number}@2"])
        second.cache.close_claim(second.cache.open_claim(options, second.chain(prompt(20))))
    quiet(second)
    assert machines.num_objects() == 18
    assert not passes

    receipt = second.admin.purges.purge(second.query(tags=("t",)))

    assert receipt.stored == {"remote": 3}
    quiet(second)
    assert machines.num_objects() == 0
    assert len(passes) == 1


def test_a_session_that_times_out_goes_from_tiers_too(machines: Machines) -> None:
    """What another machine computed for it before this one used it last; what it did since stays."""
    first, second = machines.start(), machines.start(session_ttl_s=100.0)
    first.serve(prompt(1), CacheOptions(session="a"))
    machines.clock.now_s += 10
    second.serve(prompt(2), CacheOptions(session="a"))
    machines.clock.now_s += 10
    first.serve(prompt(3), CacheOptions(session="a"))
    for one in (first, second):
        one.cache.offload()
    assert machines.num_objects() == 9
    machines.clock.now_s += 89.9
    quiet(second)
    assert machines.num_objects() == 9

    machines.clock.now_s += 0.1
    quiet(second)

    assert machines.num_objects() == 3
    assert [report.name for report in second.admin.sessions()] == []
    assert first.serve([*prompt(3), 1], CacheOptions(write=False)) == 1


def test_a_session_of_an_earlier_run_ends_when_it_is_time(
    machines: Machines, tmp_path: Path
) -> None:
    """So long after its newest block was computed, as if the process had gone on."""
    checked = machines.start(disk(tmp_path), session_ttl_s=100.0)
    checked.serve(prompt(1), CacheOptions(session="a"))
    machines.clock.now_s += 30
    checked.serve([*prompt(1), *prompt(2)], CacheOptions(session="a"))
    checked.serve(prompt(3), CacheOptions())
    machines.clock.now_s += 30
    checked.serve(prompt(4), CacheOptions(session="b"))
    checked.cache.close()
    machines.clock.now_s += 69.9

    again = machines.start(disk(tmp_path), session_ttl_s=100.0)
    again.admin.purges.wait_until_restored()
    quiet(again)
    assert [(one.name, one.created_at, one.ends_at) for one in again.admin.sessions()] == [
        ("a", 1000.0, 1130.0),
        ("b", 1060.0, 1160.0),
    ]
    assert all(again.known(prompt(1)))
    machines.clock.now_s += 0.1
    quiet(again)

    assert [one.name for one in again.admin.sessions()] == ["b"]
    assert not any(again.known([*prompt(1), *prompt(2)]))
    assert all(again.known(prompt(3)) + again.known(prompt(4)))
    assert again.below is not None
    assert len(list(again.below.stack.tiers[0].objects())) == 6


def test_a_session_that_ended_while_nobody_ran_ends_at_the_start(
    machines: Machines, tmp_path: Path
) -> None:
    """Once all of it is known: a block of long ago does not end one that was used since."""
    checked = machines.start(disk(tmp_path), session_ttl_s=100.0)
    for name in ("gone", "used"):
        checked.serve(prompt(1), CacheOptions(session=name))
    machines.clock.now_s += 90
    checked.serve(prompt(2), CacheOptions(session="used"))
    checked.cache.close()
    machines.clock.now_s += 50

    again = machines.start(disk(tmp_path), session_ttl_s=100.0)
    again.admin.purges.wait_until_restored()
    quiet(again)

    assert [one.name for one in again.admin.sessions()] == ["used"]
    assert all(again.known(prompt(1)) + again.known(prompt(2)))


@pytest.mark.parametrize("is_session", [False, True])
def test_what_a_purge_means_while_labels_are_read_is_in_its_receipt(
    machines: Machines, tmp_path: Path, is_session: bool
) -> None:
    """Right after a start: who reads the labels leaves to the purge what the purge means."""
    before = machines.start(disk(tmp_path))
    before.serve(prompt(1), CacheOptions(session="a", tags=["t"]))
    before.serve(prompt(2), CacheOptions())
    before.cache.close()
    machines.clock.now_s += 1

    again = machines.start(disk(tmp_path))
    assert again.below is not None
    again.below.wait(10.0)
    if is_session:
        purge = again.admin.purges.close_session(again.session_id("a"))
    else:
        purge = again.admin.purges.begin(again.query(tags=("t",)))
    receipt = purge.wait()
    quiet(again)

    assert (receipt.matched, receipt.deleted, receipt.stored) == (3, 3, {"disk": 3})
    assert again.known(prompt(2)) == [True] * 3
    assert len(list(again.below.stack.tiers[0].objects())) == 3


@pytest.mark.parametrize("is_pinned", [False, True])
def test_what_a_store_has_under_other_labels_goes_from_there(
    machines: Machines, is_pinned: bool
) -> None:
    """The block that this machine has computed for itself stays here, and its pin keeps it there too."""
    first, second = machines.start(), machines.start()
    first.serve(prompt(1), CacheOptions(tags=["t"]))
    first.cache.offload()
    machines.clock.now_s += 1
    second.serve(prompt(1), CacheOptions(read=False, pin=is_pinned))
    assert second.below is not None
    second.below.relabels.forget(second.chain(prompt(1)).keys)

    receipt = second.admin.purges.purge(second.query(tags=("t",)))

    assert receipt.deleted == 0
    assert sum(receipt.stored.values()) == 3 * (not is_pinned)
    assert machines.num_objects() == 3 * is_pinned
    assert second.known(prompt(1)) == [True] * 3


def test_what_a_store_has_of_old_goes_though_its_labels_are_known_here(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed here meanwhile, the block stays; what another machine made of it before does not."""
    second = outdating(machines, monkeypatch)
    second.serve(prompt(1), CacheOptions(read=False))
    quiet(second)
    labels = second.lifetimes.register.get(second.chain(prompt(1)).keys[0])
    assert labels is not None
    assert labels.tags == {"f@3"}, "it has not heard of the store's labels"

    second.admin.purges.purge(second.query(tags=("nobody's",)))

    assert machines.num_objects() == 0
    assert second.known(prompt(1)) == [True] * 3


@pytest.mark.parametrize("num_others", [0, 1100])
def test_an_old_version_that_comes_later_goes_with_the_next_request(
    machines: Machines, num_others: int
) -> None:
    """Another machine works with that one still; of a block with too many tags it is not known."""
    first, second = machines.start(), machines.start()
    second.serve([9], CacheOptions(tags=["f@4"]))
    machines.clock.now_s += 1
    first.serve(prompt(1), CacheOptions(tags=["f@3"]))
    for number in range(0, num_others, 50):
        first.serve(prompt(1), CacheOptions(tags=[f"g{number + at}" for at in range(50)]))
    first.cache.offload()
    assert second.serve([*prompt(1), 1], CacheOptions()) == 1
    second.serve([9], CacheOptions(tags=["f@4"]))
    quiet(second)

    assert second.serve([*prompt(1), 1], CacheOptions(write=False)) == 13
