"""What tenants may take of each place, and what pins may hold of each tier; blocks of four tokens."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.cache import PinId
from kvkeep.cache.quotas import Quotas, Share
from kvkeep.config import CacheOptions
from kvkeep.errors import CapacityError, RequestError
from kvkeep.spec import GroupSpec
from kvkeep.tiers.base import Occasion, Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.host import HostTier
from tests.content_store import full, quantised
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache, disk

Over = Callable[..., LifetimeCache]


@pytest.fixture
def over() -> Iterator[Over]:
    """Makes caches over tiers, closed at the end."""
    opened: list[LifetimeCache] = []

    def make(*tiers: Tier, clock: Clock | None = None, **settings: object) -> LifetimeCache:
        checked = LifetimeCache(clock or Clock(), tiers=tiers, **settings)  # type: ignore[arg-type]
        opened.append(checked)
        return checked

    yield make
    for checked in opened:
        checked.cache.close()


def settle(checked: LifetimeCache) -> None:
    """Let what is under way end, and what follows from it."""
    for _ in range(4):
        checked.cache.poll()
        checked.settle()


def places(checked: LifetimeCache, tokens: list[int], salt: str = "") -> list[tuple[str, ...]]:
    """Where each block of a prompt lies."""
    keys = checked.chain(tokens, salt).keys
    query = checked.query(keys=tuple(keys))
    key_to_places = {one.key: one.places for one in checked.admin.blocks(query)}
    return [key_to_places.get(key, ()) for key in keys]


def object_bytes(checked: LifetimeCache) -> int:
    """What a block takes in a tier."""
    assert checked.below is not None
    return checked.below.object_bytes(0)


def test_a_quota_on_a_tier_takes_the_least_useful_of_one_tenant(over: Over, tmp_path: Path) -> None:
    """By priority, then by use, the ends of chains first, from that tier alone; others are untouched."""
    clock = Clock()
    checked = over(HostTier(MANY), disk(tmp_path), clock=clock)
    share = Share(checked.root("x"), "disk")
    checked.serve([9] * 12, CacheOptions())
    checked.serve([1] * 12, CacheOptions(salt="x", priority=90))
    clock.now_s += 1
    checked.serve([2] * 12, CacheOptions(salt="x"))
    clock.now_s += 1
    checked.serve([3] * 12, CacheOptions(salt="x"))
    settle(checked)
    assert checked.admin.used_bytes(share) == 9 * object_bytes(checked)

    checked.admin.set_quota(share, 6 * object_bytes(checked))
    settle(checked)

    assert checked.admin.used_bytes(share) <= 6 * object_bytes(checked)
    on_disk = [["disk" in one for one in places(checked, [n] * 12, "x")] for n in (1, 2, 3)]
    assert on_disk == [[True] * 3, [False] * 3, [True, True, False]]
    assert all("host" in one for one in places(checked, [2] * 12, "x"))
    assert all("disk" in one for one in places(checked, [9] * 12))
    assert all(checked.known([2] * 12, "x"))


def test_what_comes_to_a_tier_later_is_bounded_too(over: Over, tmp_path: Path) -> None:
    """Blocks move when no request ends; a pinned one is not given up."""
    checked = over(disk(tmp_path))
    share = Share(checked.root("x"), "disk")
    checked.serve([1] * 12, CacheOptions(salt="x"))
    checked.admin.pin(PinId("p"), checked.chain([1] * 12, "x"))
    checked.admin.set_quota(share, 4 * object_bytes(checked))
    for number in range(2, 6):
        checked.serve([number] * 12, CacheOptions(salt="x"))
    checked.cache.offload()
    settle(checked)

    assert checked.admin.used_bytes(share) <= 4 * object_bytes(checked)
    assert all("disk" in one for one in places(checked, [1] * 12, "x"))


def test_a_quota_on_the_device_moves_blocks_down(over: Over) -> None:
    """They are known still; without a tier below they are forgotten."""
    for tiers in ((HostTier(MANY),), ()):
        checked = over(*tiers)
        block_bytes = checked.spec.groups[0].block_bytes(4)
        share = Share(checked.root("x"), "device")
        checked.admin.set_quota(share, 3 * block_bytes)
        for number in range(3):
            checked.serve([number] * 12, CacheOptions(salt="x"))
        settle(checked)

        assert checked.admin.used_bytes(share) <= 3 * block_bytes
        assert all(checked.known([0] * 12, "x")) == bool(tiers)
        checked.assert_idle()


def test_a_tier_that_others_bound_cannot_have_quotas(over: Over) -> None:
    """The error names the field, the value and what can."""
    checked = over(HostTier(MANY))
    with pytest.raises(RequestError, match=r"tier='moon' .* device, host"):
        checked.admin.set_quota(Share(checked.root("x"), "moon"), 1)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_pins_keep_a_share_of_a_tier_at_most(over: Over, tmp_path: Path, kind: str) -> None:
    """Beyond it pinning is refused with both numbers; what is held stays, whatever comes."""
    probe = over(HostTier(MANY) if kind == "host" else disk(tmp_path / "probe"))
    probe.serve([1] * 12, CacheOptions())
    settle(probe)
    assert probe.below is not None
    taken = probe.below.stack.tiers[0].used_bytes // 3
    capacity = 40 * taken
    tier = HostTier(capacity) if kind == "host" else DiskTier(tmp_path / "tier", capacity)
    # A fifth of the tier has room for so many, whatever is lost to whole pages.
    most = capacity // 5 // object_bytes(probe)
    checked = over(tier)
    prompt = [1] * (4 * (most + 1))
    checked.serve(prompt, CacheOptions())
    settle(checked)

    with pytest.raises(CapacityError, match=rf"keep {(most + 1) * object_bytes(checked)} bytes"):
        checked.admin.pin(PinId("all"), checked.chain(prompt))
    assert checked.admin.pins() == []
    checked.admin.pin(PinId("some"), checked.chain(prompt[: 4 * most]))
    (report,) = checked.admin.pins()
    assert report.stored == {tier.name: most}
    for number in range(2, 20):
        checked.serve([number] * 16, CacheOptions())
        settle(checked)

    assert tier.stats().num_evictions
    held = places(checked, prompt)[:most]
    assert all(tier.name in one for one in held)
    checked.admin.unpin(PinId("some"))
    assert tier.stats().in_use_bytes == 0


def test_pins_of_an_earlier_run_are_held_as_far_as_they_may(over: Over, tmp_path: Path) -> None:
    """Also where the share has become smaller: no tier is filled by what nobody can evict."""
    checked = over(disk(tmp_path))
    checked.serve([1] * 12, CacheOptions())
    checked.admin.pin(PinId("p"), checked.chain([1] * 12))
    checked.cache.close()

    again = over(disk(tmp_path))
    assert again.admin.pins()[0].stored == {"disk": 3}
    again.cache.close()
    least = over(disk(tmp_path), pin_share=1.5 * object_bytes(again) / MANY)
    assert least.admin.pins()[0].stored == {"disk": 1}
    assert least.admin.pins()[0].num_blocks == 3


@pytest.mark.parametrize("is_asked_later", [False, True])
def test_pins_are_there_after_a_crash(over: Over, tmp_path: Path, *, is_asked_later: bool) -> None:
    """A pinned block is written at once, although it stays on the device and its request may run on."""
    clock, prompt = Clock(), list(range(12))
    write_on = frozenset((Occasion.IDLE, Occasion.CLOSING))
    first = LifetimeCache(clock, tiers=[disk(tmp_path)], write_on=write_on)
    if is_asked_later:
        first.serve(prompt, CacheOptions())
        first.admin.pin(PinId("kept"), first.chain(prompt))
    else:
        first.serve(prompt, CacheOptions(pin="kept"))
    assert first.below is not None
    first.cache.poll()
    first.below.settle()

    # As after a crash: the first one was not closed.
    second = over(disk(tmp_path), clock=clock)
    assert [(one.name, one.num_blocks) for one in second.admin.pins()] == [("kept", 3)]
    first.cache.close()


@pytest.mark.parametrize("place", [None, "device", "host"])
@pytest.mark.parametrize("group", [full(), quantised()], ids=lambda group: group.name)
def test_a_quota_takes_what_all_blocks_in_order_say(
    over: Over, group: GroupSpec, place: str | None
) -> None:
    """By priority, last use and place in the register, without pinned blocks and what is used there."""
    clock, rng = Clock(), random.Random(7)
    checked = over(HostTier(MANY), clock=clock, groups=(group,))
    for number in range(30):
        clock.now_s += rng.choice([0, 0, 1])
        priority, salt = rng.choice([10, 50, 90]), rng.choice(["x", "x", "y"])
        prompt = [number % 20] * 4 * rng.randrange(1, 6)
        checked.serve(prompt, CacheOptions(salt=salt, priority=priority))
    settle(checked)
    checked.admin.pin(PinId("p"), checked.chain([3] * 4, "x"))
    register, share = checked.lifetimes.register, Share(checked.root("x"), place)
    order = {key: at for at, key in enumerate(register)}
    used = set(rng.sample(sorted(order), 10))
    quotas = Quotas(register, checked.cache._places, checked.below)
    is_there = place in (None, "device")

    ranked = sorted(
        (labels.priority, register.used_at(key) or 0.0, -order[key], key)
        for labels, keys in register.of_namespace(share.namespace)
        for key in keys
        if not labels.pins and not (is_there and key in used)
    )
    total = quotas.used_bytes(share)
    for limit in (0, total // 3, total - total // 9, total - 1, total):
        left, expected = total - limit * 0.95, []
        for *_, key in ranked if total > limit else ():
            if left <= 0:
                break
            expected.append(key)
            left -= quotas._bytes_of(place, [key]).get(key, 0)
        quotas.set(share, limit)
        assert list(quotas.excess(share, used.__contains__)) == expected
    assert expected == []
