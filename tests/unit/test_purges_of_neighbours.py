"""Processes that share a folder: what one of them purges, the others do not keep on their device."""

from pathlib import Path

from kvkeep.cli.cache_folder import Chosen, folder_purge
from kvkeep.config import CacheOptions
from tests.lifetime_books import Clock
from tests.lifetime_cache import LifetimeCache, disk

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
