"""The rules of lifetimes as bookkeeping: ends, tags, versions, pins, selectors, labels from tiers."""

from dataclasses import replace
from math import inf, nan

import pytest

from kvkeep.cache.lifetimes import (
    Labels,
    Lifetimes,
    PinId,
    Query,
    Register,
    Selector,
    SessionId,
    encode_labels,
    match,
)
from kvkeep.cache.lifetimes.versions import outdated_tags
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.errors import ConfigError
from kvkeep.spec import BlockKey
from tests.lifetime_books import Clock, chain, labels_of, made, root, serve


def test_the_longest_life_holds_whatever_the_order(clock: Clock) -> None:
    """Two requests ask for different lives of the same block."""
    tokens, ends = chain(1), []
    for ttls in ((10, 60), (60, 10)):
        lifetimes = made(clock)
        for ttl in ttls:
            serve(lifetimes, tokens, ttl=ttl)
        ends.append(labels_of(lifetimes, tokens.keys[0]).expires_at)
    assert ends == [1060.0, 1060.0]


def test_a_request_that_says_nothing_uses_the_default(clock: Clock) -> None:
    """With a default of 5 s a block ends, without one it never does, also where others asked for less."""
    tokens = chain(1)
    for default, end in ((5.0, 1005.0), (inf, inf)):
        lifetimes = made(clock, default_ttl_s=default)
        serve(lifetimes, tokens, ttl=3)
        serve(lifetimes, tokens)
        assert labels_of(lifetimes, tokens.keys[0]).expires_at == end


def test_a_life_slides_with_every_use_or_counts_from_the_first(
    lifetimes: Lifetimes, clock: Clock
) -> None:
    """Ten seconds from the last use, or from when the block was computed, whoever computed it."""
    sliding, fixed = chain(1, 1), chain(1, 2)
    for now_s in (1000.0, 1006.0):
        clock.now_s = now_s
        serve(lifetimes, sliding, ttl=10)
        serve(lifetimes, fixed, ttl=10, ttl_counts_from="first")
    assert labels_of(lifetimes, sliding.keys[0]).expires_at == 1016.0
    assert labels_of(lifetimes, fixed.keys[0]).expires_at == 1010.0


def test_a_block_is_dead_exactly_at_its_time(lifetimes: Lifetimes, clock: Clock) -> None:
    """Not a moment before; what was computed anew then begins a life of its own."""
    tokens = chain(2)
    serve(lifetimes, tokens, ttl=10, tags=["old"])
    register = lifetimes.register

    assert register.dead(tokens.keys, 1009.999) == frozenset()
    assert register.dead(tokens.keys, 1010.0) == set(tokens.keys)
    assert due(lifetimes, 1010.0) == set(tokens.keys)

    clock.now_s = 1010.0
    claim = lifetimes.open(CacheOptions(), tokens)
    lifetimes.use(claim, tokens, [0], is_new=True)
    assert labels_of(lifetimes, tokens.keys[0]) == Labels(
        namespace=root(), is_shared=True, created_at=1010.0
    )
    assert register.dead(tokens.keys, 1010.0) == {tokens.keys[1]}


def test_letting_go_of_blocks_is_a_use(lifetimes: Lifetimes, clock: Clock) -> None:
    """A response that took a minute counts from its end, for lives that slide only."""
    tokens = chain(1)
    for counts_from, end in (("use", 1070.0), ("first", 1010.0)):
        clock.now_s = 1000.0
        lifetimes = made(clock)
        claim = lifetimes.open(CacheOptions(ttl=10, ttl_counts_from=counts_from), tokens)
        lifetimes.use(claim, tokens, [0], is_new=True)
        clock.now_s = 1060.0
        lifetimes.renew(claim, tokens.keys)
        assert labels_of(lifetimes, tokens.keys[0]).expires_at == end


def test_a_life_of_nothing_publishes_nothing(lifetimes: Lifetimes) -> None:
    """ttl=0 and write=False leave nothing; only the first is a user of what it reuses."""
    assert not lifetimes.open(CacheOptions(ttl=0), chain(1)).publishes
    assert not lifetimes.open(CacheOptions(write=False), chain(1)).publishes
    tokens = chain(1)
    serve(lifetimes, tokens, session="a")
    serve(lifetimes, tokens, write=False)
    assert not labels_of(lifetimes, tokens.keys[0]).is_shared
    serve(lifetimes, tokens, ttl=0)
    assert labels_of(lifetimes, tokens.keys[0]).is_shared


def test_many_renewals_do_not_pile_up(lifetimes: Lifetimes, clock: Clock) -> None:
    """A block whose end slides ten thousand times leaves no heap of old ends."""
    tokens = chain(1)
    for _ in range(10_000):
        clock.now_s += 1
        serve(lifetimes, tokens, ttl="7d")
    assert len(lifetimes.register._expiries) < 200
    assert lifetimes.register.check() == []


# --- tags ------------------------------------------------------------------------------------------


def test_a_tag_covers_the_block_of_its_first_token_and_all_behind(lifetimes: Lifetimes) -> None:
    """Token 5 of blocks of four lies in block 1."""
    tokens = chain(4)
    serve(
        lifetimes,
        tokens,
        tags=["all", TagSpan(tag="late", start=5), TagSpan(tag="end", start=12)],
    )
    tags = [labels_of(lifetimes, key).tags for key in tokens.keys]

    assert tags == [{"all"}, {"all", "late"}, {"all", "late"}, {"all", "late", "end"}]
    found = match(Query(tags=frozenset({"late"})), lifetimes.register, 1000.0)
    assert found.keys == set(tokens.keys[1:])


def test_versions_of_a_tag_replace_each_other() -> None:
    """Only other versions of the same name, and only where the claim has a version."""
    known = ["f@1", "f@2", "g@1", "f", "mail@x@2"]
    assert outdated_tags(["f@2"], known) == {"f@1"}
    assert outdated_tags(["f@1", "f@2"], known) == frozenset()
    assert outdated_tags(["f", "@x", "x@"], known) == frozenset()
    assert outdated_tags(["mail@x@3"], known) == {"mail@x@2"}


def test_a_new_version_outdates_blocks_and_requests_of_its_tenant(lifetimes: Lifetimes) -> None:
    """Another tenant's file of the same name is another file."""
    serve(lifetimes, chain(1), tags=["f@1"])
    serve(lifetimes, chain(1, salt="x"), tags=["f@7"], salt="x")
    running = lifetimes.open(CacheOptions(tags=["f@2"]), chain(1, 5))

    newest = lifetimes.open(CacheOptions(tags=["f@3"]), chain(1, 6))

    query = lifetimes.outdating(newest)
    assert query is not None
    found = match(query, lifetimes.register, 1000.0)
    assert found.keys == set(chain(1).keys)
    lifetimes.void(query)
    assert not running.publishes
    assert newest.publishes
    assert lifetimes.outdating(lifetimes.open(CacheOptions(tags=["f"]), chain(1))) is None


def test_a_version_is_new_once(lifetimes: Lifetimes) -> None:
    """To each tenant; two versions at once outdate all but the two, in whatever order they are given."""

    def outdating(*tags: str, salt: str = "") -> frozenset[str]:
        claim = lifetimes.open(CacheOptions(tags=list(tags)), chain(1, salt=salt))
        query = lifetimes.outdating(claim)
        return frozenset() if query is None else query.versions

    assert outdating("f@1", "g@1", "h") == {"f@1", "g@1"}
    assert outdating("f@1") == frozenset()
    assert outdating("f@1", salt="x") == {"f@1"}
    assert outdating("f@1", "f@2") == {"f@1", "f@2"}
    assert outdating("f@2", "f@1", "g@1") == frozenset()
    assert outdating("f@2") == {"f@2"}


# --- pins ------------------------------------------------------------------------------------------


def test_a_block_is_kept_until_its_last_pin_has_ended(lifetimes: Lifetimes, clock: Clock) -> None:
    """Two pins mean it; past its time it is alive while one of them does."""
    tokens = chain(1)
    serve(lifetimes, tokens, ttl=10)
    for name in ("p", "q"):
        lifetimes.pin(PinId(name), root(), tokens.keys)
    clock.now_s = 2000.0
    assert lifetimes.register.dead(tokens.keys, clock.now_s) == frozenset()

    lifetimes.unpin(PinId("p"))
    assert due(lifetimes, clock.now_s) == set()
    lifetimes.unpin(PinId("q"))

    assert due(lifetimes, clock.now_s) == set(tokens.keys)
    assert lifetimes.pins == {}


def due(lifetimes: Lifetimes, now_s: float) -> set[BlockKey]:
    """All that has expired."""
    return {key for _, keys in lifetimes.register.due(now_s) for key in keys}


# --- selectors ---------------------------------------------------------------------------------------


def test_a_selector_means_what_fits_every_field(lifetimes: Lifetimes, clock: Clock) -> None:
    """Tags of one tenant, old ones, unused ones, keys; pinned blocks only if they are meant."""
    mine, theirs, old = chain(1), chain(1, salt="x"), chain(1, 3)
    serve(lifetimes, old, tags=["t"])
    clock.now_s = 1100.0
    serve(lifetimes, mine, tags=["t"])
    serve(lifetimes, theirs, tags=["t"], salt="x")
    clock.now_s = 1150.0
    lifetimes.pin(PinId("p"), root(), mine.keys)

    def found(**fields: object) -> set[BlockKey]:
        selector = Selector(**fields)  # type: ignore[arg-type]
        query = selector.resolve(lambda salt: root(salt or ""), clock.now_s)
        return set(match(query, lifetimes.register, clock.now_s).keys)

    a, b, c = mine.keys[0], theirs.keys[0], old.keys[0]
    assert found(tags=("t",)) == {b, c}
    assert found(tags=("t",), include_pinned=True) == {a, b, c}
    assert found(tags=("t", "u"), salts=(None,)) == {c}
    assert found(salts=("x",)) == {b}
    assert found(older_than_s=100) == {c}
    assert found(unused_for_s=100) == {c}
    assert found(keys=(a, b)) == {b}
    assert found(everything=True) == {b, c}
    assert found(tags=("u",)) == set()
    serve(lifetimes, old)
    assert found(unused_for_s=100) == set()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"everything": True, "tags": ("a",)},
        {"older_than_s": -1},
        {"older_than_s": inf},
        {"unused_for_s": inf},
        {"unused_for_s": nan},
        {"tags": "abc"},
        {"tiers": ("disk",)},
    ],
)
def test_a_selector_that_means_nothing_clear_is_refused(fields: dict[str, object]) -> None:
    """Nobody purges everything by leaving something out."""
    with pytest.raises(ConfigError):
        Selector(**fields)  # type: ignore[arg-type]


def test_an_empty_list_of_keys_means_no_block(lifetimes: Lifetimes) -> None:
    """A prompt without a full block is not everything."""
    serve(lifetimes, chain(1))
    query = Selector(keys=()).resolve(lambda _: root(), 1000.0)
    assert match(query, lifetimes.register, 1000.0).keys == frozenset()


# --- what comes from tiers ---------------------------------------------------------------------------


def stored(**fields: object) -> bytes:
    """Labels as a tier has them."""
    return encode_labels(replace(Labels(namespace=root()), **fields))  # type: ignore[arg-type]


def test_labels_from_a_tier_decide_whether_a_block_is_used(clock: Clock) -> None:
    """Expired, early by the clocks' skew, unreadable, of another tenant: not used. Unlabelled: used."""
    lifetimes = made(clock, max_clock_skew_s=5.0)
    (key,) = chain(1).keys
    for encoded, is_alive in [
        (stored(expires_at=1000.0), False),
        (stored(expires_at=1005.0), False),
        (b"garbage", False),
        (encode_labels(Labels(namespace=root("x"))), False),
    ]:
        assert lifetimes.arrive(key, root(), encoded).is_alive is is_alive
        assert key not in lifetimes.register
    assert lifetimes.arrive(key, root(), stored(expires_at=1005.1, is_shared=True)).is_alive
    other = chain(1, 2).keys[0]
    assert lifetimes.arrive(other, root(), b"").is_alive
    assert labels_of(lifetimes, other).is_shared


def test_what_was_purged_is_not_used_where_a_tier_still_has_it(
    lifetimes: Lifetimes, clock: Clock
) -> None:
    """A tier that failed to delete gives it later: older than the purge it is refused, newer it is not."""
    key, other = chain(1, 1).keys[0], chain(1, 2).keys[0]
    for query in (Query(tags=frozenset({"t"})), Query(keys=frozenset({other}))):
        lifetimes.purged.end(lifetimes.purged.begin(query, clock.now_s))
    tagged = {"tags": frozenset({"t"}), "is_shared": True}
    clock.now_s = 1100.0

    assert (
        lifetimes.arrive(key, root(), stored(created_at=1000.0, **tagged)).refusal == "invalidated"
    )
    assert lifetimes.arrive(key, root(), stored(created_at=1000.1, **tagged)).is_alive
    assert not lifetimes.arrive(other, root(), stored(created_at=900.0, is_shared=True)).is_alive
    assert lifetimes.arrive(chain(1, 3).keys[0], root(), stored(is_shared=True)).is_alive


@pytest.mark.parametrize("is_over", [False, True])
def test_what_comes_with_the_newest_version_was_not_purged(
    lifetimes: Lifetimes, clock: Clock, is_over: bool
) -> None:
    """However old the block is itself; with an older version it was."""
    for at, tag in enumerate(["f@1", "f@2"]):
        query = Query(versions=frozenset({tag}), namespaces=frozenset({root()}))
        number = lifetimes.purged.begin(query, clock.now_s + at)
        if is_over:
            lifetimes.purged.end(number)
    old, new = (
        stored(created_at=900.0, tags=frozenset({tag}), is_shared=True) for tag in ("f@1", "f@2")
    )

    assert lifetimes.arrive(chain(1, 1).keys[0], root(), new).is_alive
    assert not lifetimes.arrive(chain(1, 2).keys[0], root(), old).is_alive


def test_labels_from_a_tier_are_merged_with_those_that_are_known(lifetimes: Lifetimes) -> None:
    """What is known to live on is used although the tier has an older end."""
    tokens = chain(1)
    serve(lifetimes, tokens, ttl=50, session="a")

    arrival = lifetimes.arrive(
        tokens.keys[0], root(), stored(expires_at=900.0, tags=frozenset({"t"}), is_shared=True)
    )

    assert arrival.is_alive
    labels = labels_of(lifetimes, tokens.keys[0])
    assert labels.tags == {"t"}
    assert labels.sessions == {"a"}
    assert labels.expires_at == 1050.0
    assert labels.is_shared


def test_sessions_and_pins_in_labels_go_on_but_not_those_that_ended(lifetimes: Lifetimes) -> None:
    """A session that labels name is known after a restart; one that was closed does not come back.

    Nor does a block that nobody else used.
    """
    first, second = chain(1, 1).keys[0], chain(1, 2).keys[0]
    encoded = stored(sessions=frozenset({"a"}), pins=frozenset({PinId("p")}))
    assert lifetimes.restore(first, encoded)
    assert lifetimes.sessions.get(SessionId(root(), "a")) is not None
    assert lifetimes.pins == {PinId("p"): root()}

    lifetimes.end_session(SessionId(root(), "a"))
    lifetimes.unpin(PinId("p"))
    assert not lifetimes.restore(second, encoded)
    assert second not in lifetimes.register
    both = stored(sessions=frozenset({"a", "b"}))
    assert lifetimes.restore(second, both)

    assert labels_of(lifetimes, second).sessions == {"b"}
    assert lifetimes.sessions.get(SessionId(root(), "a")) is None


def test_a_purge_of_many_blocks_looks_at_few_groups() -> None:
    """Blocks of equal labels are one group, however many they are."""
    register = Register()
    keys = [BlockKey(number.to_bytes(32, "little")) for number in range(10_000)]
    labels = Labels(namespace=root(), tags=frozenset({"t"}))
    register.update(keys, lambda _: labels)

    assert len(register._labels_to_group) == 1
    assert match(Query(tags=frozenset({"t"})), register, 0.0).keys == set(keys)
    register.forget(keys)
    assert len(register) == 0
    assert register.check() == []
    assert not register._tag_to_groups
    assert not register._namespace_to_groups
