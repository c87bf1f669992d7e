"""Lifetimes carried out on the device; blocks of four tokens."""

import pytest

from kvkeep.cache import PinId
from kvkeep.cache.quotas import Share
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.errors import CapacityError, RequestError
from kvkeep.spec import GroupSpec
from tests.content_store import EVERY_MODEL
from tests.lifetime_books import Clock
from tests.lifetime_cache import LifetimeCache

PROMPT = list(range(100, 112))  # three full blocks
OTHER = [*PROMPT[:4], *range(200, 208)]  # shares the first


@EVERY_MODEL
def test_an_expired_block_is_not_served(groups: tuple[GroupSpec, ...], clock: Clock) -> None:
    """Up to its time it is; from then on it is computed again, and lives again."""
    checked = LifetimeCache(clock, groups=groups)
    fixed = CacheOptions(ttl=10, ttl_counts_from="first")
    checked.serve([*PROMPT, 1], fixed, 4)
    clock.now_s += 9.9
    assert checked.serve([*PROMPT, 2], fixed, 4) == 1
    clock.now_s += 0.1

    assert checked.serve([*PROMPT, 3], CacheOptions(), 4) == 13

    assert checked.serve([*PROMPT, 4], CacheOptions(), 4) == 1
    checked.assert_idle()


def test_what_has_expired_leaves_the_device(clock: Clock) -> None:
    """A poll forgets it; a part of it is not copied by others before that either."""
    checked = LifetimeCache(clock)
    checked.serve(PROMPT, CacheOptions(ttl=10))
    clock.now_s += 10

    assert checked.gaps_of([*PROMPT[:10], 7]) == [(0, 11)]
    checked.cache.poll()

    assert checked.ledgers[0].num_sealed == 0
    assert checked.cache.stats().reusable_bytes == 0
    assert len(checked.lifetimes.register) == 0
    checked.assert_idle()


def test_a_block_in_use_does_not_expire(clock: Clock) -> None:
    """A request that runs longer than its blocks live uses them all the time."""
    checked = LifetimeCache(clock)
    chain = checked.chain(PROMPT)
    claim = checked.cache.open_claim(CacheOptions(ttl=10), chain)
    lease = checked.begin(PROMPT, claim=claim)
    assert checked.finish(lease)
    clock.now_s += 50
    checked.cache.poll()
    assert all(checked.known(PROMPT))
    lease.release()
    checked.cache.close_claim(claim, lease.chain)
    clock.now_s += 10
    assert not any(checked.known(PROMPT))


def test_a_life_of_nothing_is_gone_after_the_response(clock: Clock) -> None:
    """ttl=0 leaves nothing, and takes nothing from others."""
    checked = LifetimeCache(clock)
    checked.serve(PROMPT, CacheOptions(ttl=0))
    assert not any(checked.known(PROMPT))
    checked.serve(PROMPT, CacheOptions())
    assert checked.serve(PROMPT, CacheOptions(ttl=0)) == 1
    assert all(checked.known(PROMPT))


def test_closing_a_session_takes_what_only_it_used(clock: Clock) -> None:
    """The first block is shared with a request of another session."""
    checked = LifetimeCache(clock)
    checked.serve(PROMPT, CacheOptions(session="a"))
    checked.serve(OTHER, CacheOptions(session="b"))

    receipt = checked.admin.close_session(checked.session_id("a"))

    assert (receipt.matched, receipt.deleted, receipt.in_use) == (2, 2, 0)
    assert receipt.freed_bytes == 2 * checked.spec.groups[0].block_bytes(4)
    assert checked.known(PROMPT) == [True, False, False]
    assert checked.known(OTHER) == [True, True, True]
    assert checked.admin.close_session(checked.session_id("a")).matched == 0
    with pytest.raises(RequestError, match="session='a'"):
        checked.admin.session(checked.session_id("a"))


def test_a_request_of_a_closed_session_goes_on_and_leaves_nothing(clock: Clock) -> None:
    """It keeps its blocks as its own; nobody finds them during or after."""
    checked = LifetimeCache(clock)
    claim = checked.cache.open_claim(CacheOptions(session="a"), checked.chain(PROMPT))
    lease = checked.begin(PROMPT, claim=claim)
    assert checked.step(lease, 8)

    receipt = checked.admin.close_session(checked.session_id("a"))

    assert (receipt.deleted, receipt.in_use) == (2, 2)
    assert checked.finish(lease)
    assert not any(checked.known(PROMPT))
    lease.release()
    checked.cache.close_claim(claim, lease.chain)
    assert not any(checked.known(PROMPT))
    assert checked.cache.stats().reusable_bytes == 0
    checked.assert_idle()


def test_a_purge_by_tag_removes_exactly_the_blocks_with_it(clock: Clock) -> None:
    """From the block of the tagged token on; requests with the tag publish nothing any more."""
    checked = LifetimeCache(clock)
    tagged = CacheOptions(tags=[TagSpan(tag="doc:77", start=5)])
    checked.serve(PROMPT, tagged)
    checked.serve(OTHER, CacheOptions())
    claim = checked.cache.open_claim(tagged, checked.chain([1] * 12))
    lease = checked.begin([1] * 12, claim=claim)

    query = checked.query(tags=("doc:77",))
    planned = checked.admin.purges.purge(query, dry_run=True)
    assert all(checked.known(PROMPT))
    receipt = checked.admin.purges.purge(query)

    assert planned.dry_run
    assert (planned.matched, planned.freed_bytes) == (receipt.matched, receipt.freed_bytes)
    assert receipt.matched == receipt.deleted == 2
    assert checked.known(PROMPT) == [True, False, False]
    assert all(checked.known(OTHER))
    assert checked.finish(lease)
    lease.release()
    checked.cache.close_claim(claim, lease.chain)
    assert not any(checked.known([1] * 12))
    checked.assert_idle()


@pytest.mark.parametrize(
    "fields",
    [{"tags": ("t", "u")}, {"sessions": ("a", "b")}],
    ids=["tags", "sessions"],
)
def test_a_block_that_is_meant_twice_goes_once(
    clock: Clock, fields: dict[str, tuple[str, ...]]
) -> None:
    """It bears both of the names."""
    checked = LifetimeCache(clock)
    for session in ("a", "b"):
        checked.serve(PROMPT, CacheOptions(tags=["t", "u"], session=session))

    receipt = checked.admin.purges.purge(checked.query(**fields))

    assert (receipt.matched, receipt.deleted) == (3, 3)
    assert not any(checked.known(PROMPT))
    checked.assert_idle()


def test_a_block_with_two_old_versions_goes_once(clock: Clock) -> None:
    """A request outdates both of them."""
    checked = LifetimeCache(clock)
    checked.serve(PROMPT, CacheOptions(tags=["f@1", "g@1"]))

    checked.serve([1], CacheOptions(tags=["f@2", "g@2"]))
    checked.cache.poll()

    assert not any(checked.known(PROMPT))
    assert checked.ledgers[0].num_sealed == 0
    checked.assert_idle()


def test_a_new_version_of_a_file_purges_what_depended_on_the_old_one(clock: Clock) -> None:
    """Before its own request begins, and in its tenant only."""
    checked = LifetimeCache(clock)
    old = CacheOptions(tags=[TagSpan(tag="file:a.py@v3", start=4)])
    checked.serve(PROMPT, old)
    checked.serve(PROMPT, CacheOptions(tags=["file:a.py@v3"], salt="x"))

    checked.serve(OTHER, CacheOptions(tags=[TagSpan(tag="file:a.py@v4", start=4)]))

    assert checked.known(PROMPT) == [True, False, False]
    assert all(checked.known(PROMPT, "x"))
    assert all(checked.known(OTHER))


def test_an_old_version_that_a_pin_has_kept_goes_with_the_next_request(clock: Clock) -> None:
    """The first one of the new version has spared it, as long as it was pinned."""
    checked = LifetimeCache(clock)
    new = CacheOptions(tags=["f@2"])
    checked.serve(PROMPT, CacheOptions(tags=["f@1"], pin="p"))
    for _ in range(2):
        checked.serve([1], new)
        checked.cache.poll()
        assert all(checked.known(PROMPT))
    checked.admin.unpin(PinId("p"))

    checked.serve([1], new)
    checked.cache.poll()

    assert not any(checked.known(PROMPT))
    checked.assert_idle()


def test_pinned_blocks_are_never_evicted_nor_purged(clock: Clock) -> None:
    """A device that is filled over and over keeps them; their pin is skipped by purge and expiry."""
    checked = LifetimeCache(clock, room=20)
    checked.serve(PROMPT, CacheOptions(ttl=10, tags=["t"]))
    report = checked.admin.pin(PinId("p"), checked.chain(PROMPT))
    assert (report.num_blocks, report.num_on_device) == (3, 3)
    for number in range(20):
        checked.serve([number] * 24, CacheOptions())
    clock.now_s += 100
    checked.cache.poll()

    receipt = checked.admin.purges.purge(checked.query(tags=("t",)))

    assert (receipt.matched, receipt.deleted, receipt.skipped_pinned) == (3, 0, 3)
    assert all(checked.known(PROMPT))
    assert checked.cache.verify().ok
    with pytest.raises(
        CapacityError, match=r"would keep 6 blocks, and may keep 4 \(pin_share=0\.2"
    ):
        checked.admin.pin(PinId("q"), checked.chain([19] * 12))
    assert checked.admin.unpin(PinId("p")).num_blocks == 3
    assert not any(checked.known(PROMPT))
    assert checked.admin.pins() == []
    with pytest.raises(RequestError, match="pin='p'"):
        checked.admin.unpin(PinId("p"))
    checked.cache.poll()
    checked.assert_idle()


def test_a_purge_of_pinned_blocks_gives_their_places_back(clock: Clock) -> None:
    """Meant on purpose they go, and nothing holds them any more."""
    checked = LifetimeCache(clock, room=20)
    checked.serve(PROMPT, CacheOptions())
    checked.admin.pin(PinId("p"), checked.chain(PROMPT))

    receipt = checked.admin.purges.purge(checked.query(everything=True, include_pinned=True))

    assert (receipt.deleted, receipt.skipped_pinned, receipt.in_use) == (3, 0, 0)
    checked.assert_idle()


def serve_over_a_pin(checked: LifetimeCache, *, num_tokens: int) -> None:
    """Pin PROMPT, and serve a request that has no room beside it."""
    checked.serve(PROMPT, CacheOptions())
    checked.admin.pin(PinId("p"), checked.chain(PROMPT))
    lease = checked.begin([7] * num_tokens)
    assert not checked.step(lease)
    assert checked.cache.extend_over_pins(lease, lease.gaps)
    assert checked.finish(lease)
    lease.release()


def test_pins_never_keep_a_request_from_running(clock: Clock) -> None:
    """One that needs the whole device gets it, and no pinned block is left."""
    checked = LifetimeCache(clock, room=10, pin_share=0.3)

    serve_over_a_pin(checked, num_tokens=40)

    assert checked.admin.pins()[0].num_blocks == 0
    checked.assert_idle()


def test_a_request_takes_as_many_pinned_places_as_it_lacks(clock: Clock) -> None:
    """The end of what was pinned goes; the rest is held on, however many requests come afterwards."""
    checked = LifetimeCache(clock, room=10, pin_share=0.3)

    serve_over_a_pin(checked, num_tokens=32)

    for number in range(10, 20):
        checked.serve([number] * 24, CacheOptions())
    (pin,) = checked.admin.pins()
    assert (pin.num_blocks, pin.num_on_device) == (2, 2)
    assert checked.known(PROMPT) == [True, True, False]
    assert checked.cache.verify().ok


def test_a_request_can_pin_its_prompt(clock: Clock) -> None:
    """Full blocks of the prompt, not of the output, under a name that its content gives."""
    checked = LifetimeCache(clock, room=64)
    chain = checked.chain(PROMPT)
    claim = checked.cache.open_claim(CacheOptions(pin=True), chain)
    lease = checked.begin(PROMPT, claim=claim)
    assert checked.finish(lease)
    lease.append([1] * 8)
    assert checked.finish(lease)
    lease.release()
    checked.cache.close_claim(claim, lease.chain)

    (pin,) = checked.admin.pins()
    assert (pin.num_blocks, pin.num_on_device) == (3, 3)
    assert pin.name == f"prompt:{chain.keys[-1].hex()[:16]}"
    with pytest.raises(CapacityError, match="pin_share"):
        checked.cache.open_claim(CacheOptions(pin=True), checked.chain([5] * 400))
    assert len(checked.admin.pins()) == 1


def test_priorities_and_abandoned_branches_decide_what_goes_first(clock: Clock) -> None:
    """Low priority goes before high; before both goes what a session has turned away from."""
    checked = LifetimeCache(clock, room=10)
    checked.serve([1] * 12, CacheOptions(priority=80))
    checked.serve([2] * 12, CacheOptions(priority=20))
    checked.serve([3] * 16, CacheOptions(session="a"))
    checked.serve([*[3] * 8, 9], CacheOptions(session="a"))
    for fresh, gone in ((5, [3] * 16), (6, [2] * 12), (7, [3] * 8)):
        checked.serve([fresh] * 8, CacheOptions())
        assert all(checked.known([1] * 12))
        assert not checked.known(gone)[-1]
    checked.assert_idle()


def test_a_quota_forgets_what_was_unused_for_longest(clock: Clock) -> None:
    """Of one tenant, the ends of chains first, when a request has ended."""
    checked = LifetimeCache(clock)
    block_bytes = checked.spec.groups[0].block_bytes(4)
    checked.admin.set_quota(Share(checked.root("x")), 5 * block_bytes)
    checked.serve(PROMPT, CacheOptions())
    for number in range(2):
        clock.now_s += 1
        checked.serve([number] * 12, CacheOptions(salt="x"))

    assert checked.admin.used_bytes(Share(checked.root("x"))) <= 5 * block_bytes
    assert checked.known([0] * 12, "x") == [True, False, False]
    assert all(checked.known([1] * 12, "x"))
    assert all(checked.known(PROMPT))
