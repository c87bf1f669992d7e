"""What the cache shares, and with whom; blocks of four tokens."""

import pytest

from kvkeep.spec import GroupSpec, Span
from tests.content_store import EVERY_MODEL, cache_of, chunked, full, recurrent, sliding

PROMPT = list(range(100, 118))  # four full blocks and two tokens


@EVERY_MODEL
def test_a_cold_request_computes_everything(groups: tuple[GroupSpec, ...]) -> None:
    """Nothing is known, everything is written once, and the whole blocks stay."""
    checked = cache_of(*groups)
    lease = checked.begin(PROMPT)

    assert lease.gaps == [Span(0, 18)]
    assert lease.reused_tokens == 0
    assert checked.finish(lease, num_tokens=4)
    lease.release()

    assert checked.cache.coverage(checked.chain(PROMPT)).known_tokens == 16
    assert checked.cache.stats().computed_tokens == 18
    checked.assert_idle()


@EVERY_MODEL
def test_a_warm_request_computes_its_tail(groups: tuple[GroupSpec, ...]) -> None:
    """The same prompt again reads its whole blocks and computes what lies behind."""
    checked = cache_of(*groups)
    lease = checked.begin(PROMPT)
    assert checked.finish(lease, num_tokens=4)
    lease.release()

    again = checked.begin([*PROMPT, 7, 7])

    assert again.gaps == [Span(16, 20)]
    assert again.reused_tokens == 16
    assert checked.finish(again)
    again.release()
    assert checked.cache.stats().reused_tokens == 16
    checked.assert_idle()


@pytest.mark.parametrize("groups", [(full(),), (full(), sliding(6)), (sliding(6),)])
def test_a_full_hit_computes_the_last_token_only(groups: tuple[GroupSpec, ...]) -> None:
    """Everything is known; one token is computed for its logits, and written nowhere."""
    checked = cache_of(*groups)
    checked.warm(PROMPT[:16])
    chain = checked.chain(PROMPT[:16])

    assert checked.cache.coverage(chain).known_tokens == 16
    assert checked.cache.gaps(chain) == (Span(15, 16),)
    lease = checked.begin(PROMPT[:16])
    in_use = checked.cache.stats().in_use_bytes
    assert checked.finish(lease)
    assert checked.cache.stats().in_use_bytes <= in_use
    lease.release()
    checked.assert_idle()


def test_a_full_hit_with_a_state_starts_from_the_last_one_before_the_end() -> None:
    """The state after the last token is no use for its logits; the one a block before is."""
    checked = cache_of(full(), recurrent())
    lease = checked.begin(PROMPT[:16])
    assert checked.finish(lease, num_tokens=4)
    lease.release()

    assert checked.gaps_of(PROMPT[:16]) == [(12, 16)]
    checked.warm(PROMPT[:16])
    checked.assert_idle()


@pytest.mark.parametrize(
    ("holes", "gaps"),
    [((1,), [(4, 8), (16, 18)]), ((1, 2), [(4, 12), (16, 18)]), ((0, 3), [(0, 4), (12, 18)])],
)
def test_a_perforated_prompt_is_repaired_exactly(
    holes: tuple[int, ...], gaps: list[tuple[int, int]]
) -> None:
    """Only holes and tail are computed; blocks behind a hole stay valid."""
    checked = cache_of()
    checked.warm(PROMPT)
    checked.cache.drop(checked.chain(PROMPT), holes)

    lease = checked.begin(PROMPT)

    assert [(gap.start, gap.stop) for gap in lease.gaps] == gaps
    assert checked.finish(lease, num_tokens=3)
    lease.release()
    assert checked.gaps_of(PROMPT) == [(16, 18)]
    checked.assert_idle()


def test_a_hole_in_one_group_is_not_written_in_the_others() -> None:
    """Blocks that a group knows inside another's gap are read, and keep their place."""
    checked = cache_of(full(), sliding(6))
    checked.warm(PROMPT)
    ledger = checked.ledgers[1]
    key = checked.chain(PROMPT).keys[3]
    block = ledger.get(key)
    assert block is not None
    ledger.forget([block])

    lease = checked.begin(PROMPT)

    assert lease.gaps == [Span(12, 18)]
    assert lease.tables[0].read_only == {3}
    assert lease.tables[1].read_only == set()
    assert checked.finish(lease)
    lease.release()
    assert checked.gaps_of(PROMPT) == [(16, 18)]
    checked.assert_idle()


@pytest.mark.parametrize("groups", [(full(),), (full(), sliding(6)), (sliding(6),)])
@pytest.mark.parametrize("common", [4, 5, 6, 7, 8, 13, 16])
@pytest.mark.parametrize("length", [17, 24])
def test_a_diverging_prompt_shares_its_common_beginning_to_the_token(
    groups: tuple[GroupSpec, ...], common: int, length: int
) -> None:
    """The block in which prompts part is copied, and written from there on only."""
    checked = cache_of(*groups)
    checked.warm(PROMPT[:16])
    other = PROMPT[:common] + list(range(length - common))

    assert checked.gaps_of(other) == [(common, length)]
    lease = checked.begin(other)
    assert lease.reused_tokens == common
    assert checked.finish(lease, num_tokens=3)
    lease.release()

    assert checked.gaps_of(PROMPT[:16]) == [(15, 16)]
    checked.assert_idle()


def test_a_partial_hit_does_not_replace_what_a_group_knows() -> None:
    """A group that knows the whole block keeps it; the others get the copy."""
    checked = cache_of(full("a"), full("b"))
    checked.warm([1, 2, 3, 4, 5, 6, 7, 8])
    checked.warm([1, 2, 3, 4, 5, 6, 9, 9])
    for ledger in checked.ledgers[:1]:
        block = ledger.get(checked.chain([1, 2, 3, 4, 5, 6, 7, 8]).keys[1])
        assert block is not None
        ledger.forget([block])

    lease = checked.begin([1, 2, 3, 4, 5, 6, 7, 8, 1])

    assert lease.gaps == [Span(6, 9)]
    assert lease.tables[1].read_only == {1}
    assert checked.finish(lease)
    lease.release()
    checked.assert_idle()


@pytest.mark.parametrize("length", [13, 14, 15])
def test_a_request_that_ends_inside_a_shared_block_writes_into_a_copy(length: int) -> None:
    """The block others know is not touched when the request goes on with other tokens."""
    checked = cache_of(full(), sliding(6))
    checked.warm(PROMPT[:16])

    lease = checked.begin(PROMPT[:length])
    assert lease.gaps == [Span(length - 1, length)]
    assert checked.finish(lease)
    for token in range(8):
        lease.append([token])
        assert checked.finish(lease)
    lease.release()

    assert checked.gaps_of(PROMPT[:16]) == [(15, 16)]
    assert checked.gaps_of([*PROMPT[:length], *range(8), 1])[-1][1] == length + 9
    checked.assert_idle()


@EVERY_MODEL
def test_generated_tokens_are_reused_like_prompts(groups: tuple[GroupSpec, ...]) -> None:
    """A conversation that comes back with its answer computes only what is new."""
    checked = cache_of(*groups)
    lease = checked.begin(PROMPT)
    assert checked.finish(lease, num_tokens=4)
    for token in range(10):
        lease.append([token])
        assert checked.step(lease)
    lease.release()

    assert checked.gaps_of([*PROMPT, *range(10), 5]) == [(28, 29)]
    checked.assert_idle()


def test_without_reading_everything_is_computed() -> None:
    """A request may ask not to be served from the cache; what it computes is known already."""
    checked = cache_of(full(), recurrent())
    checked.warm(PROMPT)

    lease = checked.reserve(PROMPT, read=False)

    assert lease is not None
    assert lease.gaps == [Span(0, 18)]
    assert checked.finish(lease, 4)
    lease.release()
    checked.assert_idle()


def test_without_writing_nothing_stays() -> None:
    """A request may read what others left and leave nothing itself."""
    checked = cache_of(full(), recurrent())
    checked.warm(PROMPT[:8])
    before = checked.snapshot()

    lease = checked.reserve(PROMPT, write=False)
    assert lease is not None
    assert lease.reused_tokens == 8
    assert checked.finish(lease, 4)
    lease.release()

    assert checked.known_prefixes(0) | checked.known_prefixes(1) == set(
        checked.store.prefixes(checked.chain(PROMPT[:8]))[4:9:4]
    )
    assert before != checked.snapshot()  # the counters have moved
    assert checked.gaps_of(PROMPT) == [(8, 18)]
    checked.assert_idle()


def test_salts_never_meet() -> None:
    """Equal prompts of different tenants share nothing, not even the beginning of a block."""
    checked = cache_of()
    checked.warm(PROMPT, salt="a")

    assert checked.gaps_of(PROMPT, salt="b") == [(0, 18)]
    assert checked.gaps_of(PROMPT[:3], salt="b") == [(0, 3)]
    assert checked.gaps_of(PROMPT) == [(0, 18)]
    assert checked.gaps_of(PROMPT, salt="a") == [(16, 18)]


@pytest.mark.parametrize("group", [sliding(6), chunked(8)])
def test_blocks_that_a_window_has_passed_are_given_back(group: GroupSpec) -> None:
    """However long the request, it holds its window; what it passed stays reusable."""
    checked = cache_of(full(), group, room=40)
    lease = checked.begin(list(range(100)))
    most = 0
    while lease.gaps:
        assert checked.step(lease, 4)
        most = max(most, checked.cache.stats().groups[1].in_use)
    for token in range(20):
        lease.append([token])
        assert checked.step(lease)
        most = max(most, checked.cache.stats().groups[1].in_use)

    assert most <= 4
    assert most <= checked.cache.blocks_needed(120, 4)[1]
    assert checked.cache.stats().groups[0].in_use == 30
    assert checked.cache.stats().groups[1].reusable >= 20
    lease.release()
    checked.assert_idle()


def test_dropped_blocks_stay_with_their_holders() -> None:
    """A drop hides content from others; who holds it reads on, and frees it at the end."""
    checked = cache_of()
    checked.warm(PROMPT)
    lease = checked.begin(PROMPT)

    receipt = checked.cache.drop(checked.chain(PROMPT), [0, 2, 2])

    assert (receipt.num_blocks, receipt.num_held) == (2, 2)
    assert receipt.num_bytes == 2 * checked.spec.block_bytes()
    assert checked.gaps_of(PROMPT) == [(0, 4), (8, 12), (16, 18)]
    checked.check_lease(lease)
    assert checked.finish(lease)
    lease.release()
    assert checked.cache.stats().groups[0].reusable == 2
    checked.assert_idle()


def test_a_drop_of_what_is_unknown_counts_nothing() -> None:
    """Blocks that are not there are no error."""
    checked = cache_of()

    receipt = checked.cache.drop(checked.chain(PROMPT), range(4))

    assert (receipt.num_blocks, receipt.num_bytes, receipt.num_held) == (0, 0, 0)


@EVERY_MODEL
def test_clearing_forgets_everything_and_disturbs_nobody(groups: tuple[GroupSpec, ...]) -> None:
    """After a clear nothing is known, and a running request goes on."""
    checked = cache_of(*groups)
    checked.warm([5] * 9)
    lease = checked.begin(PROMPT)
    assert checked.step(lease, 8)

    receipt = checked.cache.clear()

    assert receipt.num_blocks >= 4
    assert checked.gaps_of(PROMPT) == [(0, 18)]
    assert checked.gaps_of([5] * 9) == [(0, 9)]
    checked.check_lease(lease)
    assert checked.finish(lease)
    lease.release()
    checked.assert_idle()


def test_an_empty_prompt_has_no_coverage() -> None:
    """Asking about nothing is allowed."""
    checked = cache_of()

    assert checked.cache.coverage(checked.chain([])).runs == ()
    assert checked.cache.gaps(checked.chain([])) == ()
