"""Processes that share a folder: what one of them purges, the others do not keep on their device."""

from pathlib import Path

import pytest

from kvkeep.cache.lifetimes.appended_line import FollowedFile, append_line, replace_content
from kvkeep.cache.lifetimes.journal import PurgeJournal
from kvkeep.cli.cache_folder import Chosen, folder_purge
from kvkeep.config import CacheOptions
from kvkeep.tiers.host import HostTier
from kvkeep.tiers.wrapper import TierWrapper
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk

PROMPT = list(range(100, 112))
NOTHING = CacheOptions(write=False)


def neighbours(folder: Path) -> tuple[LifetimeCache, LifetimeCache]:
    """Two over one folder, as two servers, that have the prompt on their devices."""
    clock = Clock()
    both = LifetimeCache(clock, tiers=[disk(folder)]), LifetimeCache(clock, tiers=[disk(folder)])
    for one in both:
        one.admin.purges.wait_until_restored()
        one.serve(PROMPT, CacheOptions(tags=["gone"], session="gone"))
    clock.now_s += 1
    return both


def test_a_purge_by_one_reaches_the_device_of_the_other(tmp_path: Path) -> None:
    """And what that one computes later lasts, its own purges and those of before included."""
    first, second = neighbours(tmp_path)
    first.admin.purges.purge(first.query(tags=("gone",)))
    first.clock.now_s += 1
    second.cache.poll()

    assert second.serve([*PROMPT, 1], NOTHING) == len(PROMPT) + 1
    second.serve(PROMPT, CacheOptions(tags=["gone"]))
    second.cache.poll()
    second.cache.offload()
    second.cache.poll()
    assert second.serve([*PROMPT, 1], NOTHING) == 1
    second.cache.close()
    first.cache.close()
    assert list(disk(tmp_path).objects())


def test_a_session_that_one_closes_leaves_nothing_with_the_other(tmp_path: Path) -> None:
    """Not in the folder either, once both are closed."""
    first, second = neighbours(tmp_path)
    first.admin.close_session(first.session_id("gone"))
    second.cache.poll()
    second.cache.close()
    first.cache.close()

    assert not list(disk(tmp_path).objects())


def test_a_journal_that_is_begun_anew_is_followed(tmp_path: Path) -> None:
    """Also by one who has read less of the old one than there is of the new one."""
    first, second = neighbours(tmp_path)
    for number in range(3):
        first.admin.purges.purge(first.query(tags=(f"other-{number}",)))
    second.cache.poll()
    (tmp_path / "purges.jsonl").rename(tmp_path / "old")
    for tag in ("gone", *(f"more-{number}" for number in range(6))):
        first.admin.purges.purge(first.query(tags=(tag,)))
    second.cache.poll()

    assert second.serve([*PROMPT, 1], NOTHING) == len(PROMPT) + 1
    second.cache.close()
    first.cache.close()


def test_what_is_deleted_from_the_folder_leaves_the_device_too(tmp_path: Path) -> None:
    """By the command line, beside a server."""
    first, second = neighbours(tmp_path)
    first.cache.offload()
    second.cache.close()
    first.serve(PROMPT, CacheOptions())
    folder_purge(tmp_path, Chosen(tags=("gone",)), dry_run=False)
    first.cache.poll()

    assert first.serve([*PROMPT, 1], NOTHING) == len(PROMPT) + 1
    first.cache.close()


def test_the_last_lines_of_a_journal_that_is_replaced_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The purge that made it too long is in none that lies there now."""
    first, second = neighbours(tmp_path)
    first.admin.purges.purge(first.query(tags=("other",)))
    second.cache.poll()
    finish = PurgeJournal.finish

    def finish_long(journal: PurgeJournal, purge_id: str) -> None:
        journal._shorten_at = 1
        finish(journal, purge_id)

    monkeypatch.setattr(PurgeJournal, "finish", finish_long)
    first.admin.purges.purge(first.query(tags=("gone",)))
    assert not (tmp_path / "purges.jsonl").exists()
    second.cache.poll()

    assert second.serve([*PROMPT, 1], NOTHING) == len(PROMPT) + 1
    second.cache.close()
    first.cache.close()


def test_a_file_that_is_replaced_is_told_from_the_one_before(tmp_path: Path) -> None:
    """As long and, if the system likes, of the same number; unfinished lines are kept."""
    path = tmp_path / "lines"
    append_line(path, b"one")
    followed = FollowedFile(path)
    assert followed.read_on().split() == [b"one"]
    append_line(path, b"two")
    assert replace_content(path, lambda before: b"" if b"one" in before else before) == 0
    for text in (b"new", b"own"):
        append_line(path, text)

    assert followed.read_on().split() == [b"two", b"new", b"own"]
    assert followed.read_on() == b""
    assert replace_content(path, lambda before: before.replace(b"\nnew\n", b"")) == 5
    assert followed.read_on().split() == [b"own"]
    path.unlink()
    assert followed.read_on() == b""
    followed.close()


def test_only_what_is_finished_goes_from_a_journal(tmp_path: Path) -> None:
    """Those of other processes that run included, with what tiers have yet to hear."""
    query = LifetimeCache(Clock()).query(everything=True)
    one, other = PurgeJournal(tmp_path), PurgeJournal(tmp_path)
    left = other.begin(query, 1.0, tiers=["disk", "far"])
    other.leave(left, "far", [])
    finished = one.begin(query, 2.0)
    one._shorten_at = 1
    one.finish(finished)

    assert len((tmp_path / "purges.jsonl").read_text().splitlines()) == 2
    (unfinished,) = PurgeJournal(tmp_path).unfinished()
    assert unfinished.purge_id == left
    assert unfinished.tiers == {"disk", "far"}
    assert unfinished.left == {"far": []}


class Far(TierWrapper):
    """A tier that one of the processes has, and that lasts."""

    def close(self) -> None:
        pass


def test_a_process_without_a_tier_does_not_end_a_purge_there(tmp_path: Path) -> None:
    """It has gone on with what it has; who has that tier finishes it."""
    clock, far = Clock(), HostTier(MANY)
    second = LifetimeCache(clock, tiers=[disk(tmp_path), Far(far)])
    second.serve(PROMPT, CacheOptions(tags=["gone"]))
    second.cache.offload()
    clock.now_s += 1
    query = second.query(tags=("gone",))
    second.cache.close()
    # As one that is killed right after it has begun.
    PurgeJournal(tmp_path).begin(query, clock.now_s, tiers=["disk", "host"])
    first = LifetimeCache(clock, tiers=[disk(tmp_path)], before=second)
    first.cache.poll()
    first.settle()
    first.cache.close()
    assert len(list(far.objects())) == 3

    third = LifetimeCache(clock, tiers=[disk(tmp_path), Far(far)], before=second)
    third.cache.poll()
    third.settle()
    assert third.serve([*PROMPT, 1], NOTHING) == len(PROMPT) + 1
    assert not list(far.objects())
    third.cache.close()
    assert PurgeJournal(tmp_path).unfinished() == []


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_purge_reaches_the_tiers_that_only_the_other_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    """Of blocks that nobody knows, be it after a restart; and nobody follows it for ever."""
    monkeypatch.setattr("kvkeep.cache.searches._PATIENCE_S", 1000.0 if is_killed else 0.0)
    clock, far = Clock(), HostTier(MANY)
    filled = LifetimeCache(clock, tiers=[Far(far)])
    filled.serve(PROMPT, CacheOptions(tags=["gone"]))
    filled.cache.offload()
    filled.cache.close()
    clock.now_s += 1
    first = LifetimeCache(clock, tiers=[disk(tmp_path)], before=filled)
    second = LifetimeCache(clock, tiers=[disk(tmp_path), Far(far)], before=filled)
    for one in (first, second):
        one.admin.purges.wait_until_restored()

    first.admin.purges.purge(first.query(tags=("gone",)))
    for _ in range(3):
        for one in (second, first):
            one.cache.poll()
            one.settle()
    lines = (tmp_path / "purges.jsonl").read_text().split()
    assert sum('"query"' in line for line in lines) == 2
    if is_killed:
        assert list(far.objects())
        second.cache.close()
        second = LifetimeCache(clock, tiers=[disk(tmp_path), Far(far)], before=filled)
        second.cache.poll()
        second.settle()

    assert not list(far.objects())
    second.cache.close()
    first.cache.close()
