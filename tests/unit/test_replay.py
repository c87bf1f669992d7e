"""Traces go through the real index, policies and tiers, and every number adds up."""

from collections import OrderedDict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import ConfigError
from kvkeep.policies import LRU
from kvkeep.replay import (
    Comparison,
    Replay,
    ReplayReport,
    ReplaySettings,
    ReplayTier,
    TraceRequest,
    Visit,
    parse_capacity,
    parse_tier,
    report_json,
    visits_of,
)
from kvkeep.replay.timed_policy import TimedPolicy
from kvkeep.tiers.base import Occasion
from kvkeep.tiers.settings import Disk, Host, Remote

# Blocks of four tokens of ten bytes.
BLOCK_TOKENS, BLOCK_BYTES = 4, 40


def visits(*chains: str, every_ms: int = 1000, output_length: int = 0) -> list[Visit]:
    """Requests whose input is these blocks, a letter each, one a second."""
    requests = [
        TraceRequest(
            timestamp_ms=number * every_ms,
            input_length=BLOCK_TOKENS * len(chain),
            output_length=output_length,
            hash_ids=tuple(map(ord, chain)),
        )
        for number, chain in enumerate(chains)
    ]
    return visits_of(requests, BLOCK_TOKENS)


def settings(num_blocks: int, *tiers: ReplayTier, policy: str = "lru") -> ReplaySettings:
    """A device of so many blocks."""
    return ReplaySettings(
        capacity_bytes=num_blocks * BLOCK_BYTES,
        bytes_per_token=10,
        block_tokens=BLOCK_TOKENS,
        policy=policy,
        tiers=tiers,
        idle_s=10,
    )


def tier(name: str, num_blocks: int, *write_on: Occasion, policy: str = "lru") -> ReplayTier:
    """A tier of so many blocks, written to on these occasions."""
    return ReplayTier(
        name=name,
        capacity_bytes=num_blocks * BLOCK_BYTES,
        policy=policy,
        write_on=frozenset(write_on or Occasion),
    )


def replay(trace: list[Visit], under: ReplaySettings) -> ReplayReport:
    """One pass and what it is compared with."""
    return Comparison(trace).replay(under)


def level_hits(report: ReplayReport) -> list[int]:
    """Blocks found in each place, the device first."""
    return [level.hits for level in report.levels]


def test_a_device_finds_what_it_has_kept() -> None:
    """By hand: four places, leaves go before roots, the least recently used first."""
    report = replay(visits("abc", "abd", "xy", "abc"), settings(4))

    # "abd" finds a and b; c and d go for x and y, then y goes for c.
    assert level_hits(report) == [4]
    assert report.passed.prefix_hits == 4
    assert report.passed.num_lookups == 11
    assert report.ideal_hits == 5
    assert report.optimum.hits == 5
    assert report.levels[0].num_evictions == 3


def test_a_hole_is_a_hit_behind_which_no_prefix_goes_on() -> None:
    """A chain of which the root alone was lost is found, but for the root, with holes allowed."""
    trace = visits("abc", "abc", "xyz", "abc")
    found = Replay(settings(6), 100)
    found.run(trace[:2])
    root = found._ledger.get(trace[0].keys[0])
    assert root is not None
    found._ledger.forget([root])

    passed = found.run(trace[3:])

    assert (passed.hits, passed.prefix_hits) == (3 + 2, 3)
    assert found.check() == []


def test_what_the_device_lets_go_is_found_below() -> None:
    """Evicted blocks go one floor down, are got from there, and fall on to the next floor."""
    report = replay(
        visits("abc", "def", "abc", "ghi", "abc", "def"),
        settings(3, tier("host", 3, Occasion.EVICTED), tier("disk", 9, Occasion.EVICTED)),
    )
    device, host, disk = report.levels

    assert level_hits(report) == [0, 3, 6]
    assert report.passed.hits == report.ideal_hits == report.passed.prefix_hits
    assert device.num_evictions == 15
    assert host.read_bytes == 3 * BLOCK_BYTES
    assert disk.read_bytes == 6 * BLOCK_BYTES
    assert host.used_bytes == 3 * BLOCK_BYTES
    assert disk.written_bytes == host.num_evictions * BLOCK_BYTES == 6 * BLOCK_BYTES


def test_tiers_are_written_to_on_their_occasions_only() -> None:
    """What finished, what was used again, and what rested, each in a tier of its own."""
    report = replay(
        visits("ab", "cd", "ab", "ab", every_ms=6000),
        settings(
            9,
            tier("finished", 9, Occasion.FINISHED),
            tier("reused", 9, Occasion.REUSED),
            tier("idle", 9, Occasion.IDLE),
        ),
    )

    # "ab" has rested when it comes again, and is found below; "cd" has when the last request comes.
    assert [level.written_bytes // BLOCK_BYTES for level in report.levels[1:]] == [4, 2, 4]
    assert level_hits(report) == [2, 2, 0, 0]


def test_resting_blocks_are_offered_once_for_each_use() -> None:
    """A block used again before it is idle starts its rest anew; one that is gone is not offered."""
    trace = visits("ab", "ab", "cd", every_ms=6000)
    early = replay(trace, settings(9, tier("idle", 9, Occasion.IDLE)))
    late = replay(
        [*trace, *visits("zz", "ef", every_ms=18_000)[1:]],
        settings(9, tier("idle", 9, Occasion.IDLE)),
    )
    small = replay(
        [*trace, *visits("zz", "ef", every_ms=18_000)[1:]],
        settings(2, tier("idle", 9, Occasion.IDLE)),
    )

    assert early.levels[1].written_bytes == 0
    assert late.levels[1].written_bytes == 2 * BLOCK_BYTES
    assert small.levels[1].written_bytes == 0


def test_a_copy_ages_or_not_while_the_device_uses_the_block() -> None:
    """With touches a use on the device keeps the copy below young; else the copy goes first."""
    trace = visits("a", "b", "a", "c", "d", "a")
    under = settings(2, tier("host", 3, Occasion.FINISHED))

    assert level_hits(replay(trace, under)) == [1, 1]
    assert level_hits(replay(trace, replace(under, touches_copies=False))) == [1, 0]


def test_requests_that_do_not_fit_count_on_no_side() -> None:
    """A request larger than the device is refused by an engine, whatever the cache."""
    trace = visits("abcd", "ab", "abcd", "ab")
    report = replay(trace, settings(3))

    assert (report.num_requests, report.num_refused) == (2, 2)
    assert report.passed.num_lookups == 4
    assert report.lookup_tokens == 16
    assert level_hits(report) == [2]
    assert report.ideal_hits == report.optimum.hits == 2


def test_output_takes_places_and_is_never_found() -> None:
    """Blocks of output push others out; a partial one leaves nothing behind."""
    with_output = replay(visits("ab", "cd", "ab", output_length=5), settings(7))
    without = replay(visits("ab", "cd", "ab"), settings(7))

    assert without.levels[0].used_bytes == 4 * BLOCK_BYTES
    assert with_output.levels[0].used_bytes == 6 * BLOCK_BYTES
    assert level_hits(with_output) == level_hits(without) == [2]
    assert replay(visits("ab", "cd", "ab", output_length=5), settings(4)).passed.hits == 0


@given(
    chains=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=30),
    num_blocks=st.integers(5, 12),
    policy=st.sampled_from(["lru", "slru", "gdsf", "s3fifo"]),
    below=st.lists(st.integers(1, 12), max_size=2),
)
def test_hits_are_bounded_and_the_books_are_right(
    chains: list[str], num_blocks: int, policy: str, below: list[int]
) -> None:
    """No policy and no stack finds more than the clairvoyant; every hit is counted in one place."""
    trace = visits(*chains, output_length=3)
    under = settings(
        num_blocks,
        *(tier(f"tier{at}", size, policy=policy) for at, size in enumerate(below)),
        policy=policy,
    )
    fitting = [visit for visit in trace if visit.num_places <= num_blocks]
    report = replay(trace, under)
    again = Replay(under, 10_000)
    passed = again.run(fitting)

    assert again.check() == []
    assert (passed.hits, passed.prefix_hits) == (report.passed.hits, report.passed.prefix_hits)
    assert report.passed.prefix_hits <= report.passed.hits == sum(level_hits(report))
    assert report.passed.hits <= report.optimum.hits <= report.ideal_hits
    assert report.optimum.prefix_hits == report.optimum.hits
    assert all(level.used_bytes <= level.capacity_bytes for level in report.levels)


@given(
    chains=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=40),
    num_blocks=st.integers(5, 12),
)
def test_an_lru_device_does_what_an_ordered_dict_does(chains: list[str], num_blocks: int) -> None:
    """A model in a few lines: prefixes in order of use, the leaf of a request before its root."""
    kept: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for chain in chains:
        prefixes = [chain[: stop + 1] for stop in range(len(chain))]
        hits += sum(prefix in kept for prefix in prefixes)
        for prefix in reversed(prefixes):
            kept.pop(prefix, None)
        while len(kept) + len(prefixes) > num_blocks:
            kept.popitem(last=False)
        kept.update(dict.fromkeys(reversed(prefixes)))

    assert replay(visits(*chains), settings(num_blocks)).passed.hits == hits


@given(chains=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=30))
def test_enough_room_finds_everything_again(chains: list[str]) -> None:
    """A device, or a tier, that holds all blocks loses none."""
    trace = visits(*chains)
    large = replay(trace, settings(10_000))
    small = replay(trace, settings(5, tier("host", 10_000)))

    assert large.passed.hits == small.passed.hits == large.ideal_hits
    assert large.levels[0].num_evictions == 0
    assert large.share_of_ideal == large.share_of_optimum == small.share_of_optimum == 1


def test_a_report_has_rates_of_blocks_and_of_tokens() -> None:
    """Tokens of partial blocks count in one and not in the other."""
    requests = [
        TraceRequest(timestamp_ms=0, input_length=10, output_length=0, hash_ids=(1, 2, 3))
    ] * 2
    report = replay(visits_of(requests, BLOCK_TOKENS), settings(9, tier("host", 9)))
    values = report_json(report)

    assert values["block_hit_rate"] == 2 / 4
    assert values["token_hit_rate"] == 8 / 20
    assert values["levels"][0]["token_hit_rate"] == 8 / 20
    assert values["levels"][1]["block_hit_rate"] == 0
    assert values["settings"]["tiers"][0]["write_on"] == sorted(Occasion)
    assert values["share_of_ideal"] == values["share_of_optimum"] == 1
    assert values["lookups_per_s"] > 0


def test_a_trace_without_hits_has_whole_shares() -> None:
    """Nothing could be found, so nothing was missed."""
    report = replay([], settings(1))

    assert report.share_of_ideal == report.share_of_optimum == report.prefix_share_of_optimum == 1
    assert report.block_rate(0) == report.token_rate(0) == report.lookups_per_s == 0


def test_time_in_a_policy_is_added_up() -> None:
    """Every call that decides something counts; questions do not."""
    ticks = iter(range(0, 1000, 5))
    policy = TimedPolicy(LRU[int](), clock=lambda: next(ticks) * 10**9)
    policy.insert([1, 2, 3])
    policy.remove([2])
    policy.forget([3])

    assert policy.evict(1) == [1]
    assert len(policy) == 0
    assert 1 not in policy
    assert policy.spent_s == 4 * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:1KB", ReplayTier(name="host", capacity_bytes=1000)),
        (
            "disk:2KB?policy=slru",
            ReplayTier(
                name="disk",
                capacity_bytes=2000,
                policy="slru",
                write_on=frozenset(Occasion) - {Occasion.FINISHED},
            ),
        ),
        (
            "remote-2:5?write_on=reused,evicted&policy=gdsf",
            ReplayTier(
                name="remote-2",
                capacity_bytes=5,
                policy="gdsf",
                write_on=frozenset({Occasion.REUSED, Occasion.EVICTED}),
            ),
        ),
    ],
)
def test_a_tier_is_read_from_text(text: str, expected: ReplayTier) -> None:
    """Name, size, and options that replace the defaults of its kind."""
    assert parse_tier(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host", "tier='host' is no tier"),
        (":5GB", "tier=':5GB' is no tier"),
        ("host:much", "capacity of host='much' is not a size"),
        ("host:20%", "capacity of host='20%' is a share of nothing"),
        ("host:1?polcy=lru", "unknown option 'polcy'; did you mean policy?"),
        ("host:1?zzz=lru", "unknown option 'zzz'; choose from policy, write_on"),
        ("host:1?write_on=now", "'now' is not a valid Occasion; write_on takes finished, reused"),
    ],
)
def test_a_tier_that_cannot_be_read_is_a_setting_error(text: str, message: str) -> None:
    """The error has the text and the remedy."""
    with pytest.raises(ConfigError) as caught:
        parse_tier(text)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "as_opened"),
    [
        ("host", Host("1GB")),
        ("disk", Disk("folder", "1GB")),
        ("remote", Remote("redis://localhost")),
    ],
)
def test_a_replayed_tier_is_written_to_when_a_real_one_is(
    name: str, as_opened: Host | Disk | Remote
) -> None:
    """The name stands for the kind, whose occasions are those of the tiers that users ask for."""
    assert parse_tier(f"{name}:1GB").write_on == frozenset(as_opened.write_on)


def test_a_setting_that_cannot_be_is_refused() -> None:
    """Sizes below a block, sizes of nothing, and policies that do not exist."""
    with pytest.raises(ConfigError, match="capacity=39 of the device is less than one block of 40"):
        ReplaySettings(capacity_bytes=39, bytes_per_token=10, block_tokens=4)
    with pytest.raises(ConfigError, match="capacity=0 of host is less than one block"):
        settings(1, tier("host", 0))
    with pytest.raises(ConfigError, match="bytes_per_token=0 is not positive"):
        ReplaySettings(capacity_bytes=39, bytes_per_token=0)
    with pytest.raises(ConfigError, match="policy='fifo' is not known"):
        settings(1, policy="fifo")
    with pytest.raises(ConfigError, match="policy='fifo' is not known"):
        settings(1, tier("host", 1, policy="fifo"))
    assert parse_capacity("1GB", field="x") == 10**9
