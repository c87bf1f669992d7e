"""Blocks on which so many tags pile up that some are left out: every tag may mean them from then on."""

from pathlib import Path

import pytest

from kvkeep.cache.lifetimes import Lifetimes, PinId, Query
from kvkeep.cache.lifetimes.labels import ANY_TAG
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey
from tests.lifetime_books import Clock, chain, labels_of, root, serve
from tests.lifetime_cache import LifetimeCache, disk


def test_a_block_does_not_collect_tags_without_end(lifetimes: Lifetimes) -> None:
    """Beyond a thousand the older are left out, and every tag, version or not, may mean it from then on."""
    tokens, other = chain(1), chain(2, salt="x")
    serve(lifetimes, other, tags=["other", "f@1"])
    for number in range(1024):
        serve(lifetimes, tokens, tags=[f"request:{number}"])
    assert set(tagged(lifetimes, "left-out")) == set()

    for number in range(1024, 1100):
        serve(lifetimes, tokens, tags=[f"request:{number}"])

    labels = labels_of(lifetimes, tokens.keys[0])
    assert labels.tags == {ANY_TAG, *(f"request:{number}" for number in range(1024, 1100))}
    assert all(labels.bears({tag}) for tag in ("request:0", "request:1099", "left-out"))
    assert tagged(lifetimes, "request:0") == set(tokens.keys)
    assert tagged(lifetimes, "other") == {*tokens.keys, *other.keys}
    register, new = lifetimes.register, Query(versions=frozenset(("f@2",)))
    for roots in (None, (root(),)):
        known = register.of_versions(roots, "f@2")
        assert tokens.keys[0] in {key for _, keys in known for key in keys}
    assert new.fits(labels)
    assert register.check() == []


def test_a_block_of_many_tags_keeps_its_pins_sessions_and_life(
    lifetimes: Lifetimes, clock: Clock
) -> None:
    """Tags that are left out change nothing else."""
    tokens = chain(1)
    serve(lifetimes, tokens, session="a", priority=90, ttl=50)
    before = labels_of(lifetimes, tokens.keys[0])
    lifetimes.pin(PinId("p"), root(), tokens.keys)
    for number in range(1100):
        serve(lifetimes, tokens, tags=[f"request:{number}"], session="b", ttl=5)
    labels = labels_of(lifetimes, tokens.keys[0])
    assert labels.pins == {"p"}
    assert labels.sessions == {"a", "b"}
    assert (labels.expires_at, labels.created_at) == (before.expires_at, before.created_at)
    assert labels.priority == 90


def tagged(lifetimes: Lifetimes, tag: str) -> set[BlockKey]:
    """All that a tag may mean."""
    return {key for _, keys in lifetimes.register.tagged(tag) for key in keys}


def test_a_pin_outlives_any_number_of_tags(clock: Clock) -> None:
    """It is listed with its blocks, and a purge of everything else leaves them."""
    checked = LifetimeCache(clock)
    prompt = list(range(12))
    checked.serve(prompt, CacheOptions(pin="system"))
    for number in range(1025):
        checked.serve(prompt, CacheOptions(tags=[f"user:{number}"]))

    (pin,) = checked.admin.pins()
    receipt = checked.admin.purges.purge(checked.query(everything=True))

    assert pin.num_blocks == 3
    assert (receipt.deleted, receipt.skipped_pinned) == (0, 3)
    assert all(checked.known(prompt))


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_purge_by_a_tag_that_was_left_out_means_the_block(
    clock: Clock, tmp_path: Path, *, is_pinned: bool
) -> None:
    """It is computed anew, here and after a restart; only a pin keeps it, as from any purge."""
    checked = LifetimeCache(clock, tiers=[disk(tmp_path)])
    prompt = list(range(12))
    checked.serve(prompt, CacheOptions(pin="system" if is_pinned else False))
    for number in range(1025):
        checked.serve(prompt, CacheOptions(tags=[f"user:{number}"]))
    query = checked.query(tags=("user:0",))

    assert checked.admin.purges.purge(query, dry_run=True).matched == 3
    receipt = checked.admin.purges.purge(query)

    assert (receipt.deleted, receipt.skipped_pinned) == ((0, 3) if is_pinned else (3, 0))
    assert all(checked.known(prompt)) == is_pinned
    checked.cache.close()
    again = LifetimeCache(clock, tiers=[disk(tmp_path)], before=checked)
    assert all(again.known(prompt)) == is_pinned
    again.cache.close()
