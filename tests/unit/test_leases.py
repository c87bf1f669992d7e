"""What a request may do with what it holds, and what it needs; blocks of four tokens."""

from collections.abc import Callable

import pytest

from kvkeep.cache import KVCache, Lease
from kvkeep.spec import BlockId, GroupSpec, Span
from tests.content_store import (
    EVERY_MODEL,
    CheckedCache,
    cache_of,
    chunked,
    full,
    recurrent,
    sliding,
    spec_of,
)

PROMPT = list(range(100, 118))  # four full blocks and two tokens


@EVERY_MODEL
def test_a_fork_goes_its_own_way(groups: tuple[GroupSpec, ...]) -> None:
    """Both read the same beginning; whoever writes into the shared tail copies it first."""
    checked = cache_of(*groups)
    lease = checked.begin(PROMPT)
    assert checked.finish(lease)
    before = checked.cache.stats().groups[0].in_use

    child = checked.cache.fork(lease)
    assert child is not None
    assert checked.cache.stats().groups[0].in_use == before
    for token in range(5):
        lease.append([token])
        child.append([token + 50])
        assert checked.step(child)
        assert checked.step(lease)
        checked.check_lease(lease)
        checked.check_lease(child)
        assert checked.cache.verify().ok

    lease.release()
    checked.check_lease(child)
    child.release()
    checked.assert_idle()


def test_the_last_holder_of_a_tail_writes_in_place() -> None:
    """Once the other has its copy, or is gone, nothing is copied any more."""
    checked = cache_of()
    lease = checked.begin(PROMPT)
    assert checked.finish(lease)
    tail = lease.tables[0].place(4)
    child = checked.cache.fork(lease)
    assert child is not None
    child.release()

    lease.append([1])
    assert checked.step(lease)

    assert lease.tables[0].place(4) == tail
    lease.release()


def test_a_fork_in_the_middle_of_a_gap_computes_the_rest_itself() -> None:
    """Blocks that are half filled at the fork are filled by each for itself."""
    checked = cache_of(full(), recurrent())
    lease = checked.begin(PROMPT)
    assert checked.step(lease, 4)
    assert checked.step(lease, 2)
    child = checked.cache.fork(lease)
    assert child is not None
    assert child.gaps == lease.gaps == [Span(6, 18)]

    assert checked.finish(child, 4)
    assert checked.finish(lease, 5)

    lease.release()
    child.release()
    checked.assert_idle()


def test_a_fork_of_a_state_without_room_changes_nothing() -> None:
    """The copy of a running state needs a place of its own."""
    checked = cache_of(full(), recurrent(), room=6)
    leases = [checked.begin([token]) for token in range(6)]
    before = checked.snapshot()

    assert checked.cache.fork(leases[0]) is None

    assert checked.snapshot() == before
    for lease in leases:
        lease.release()
    checked.assert_idle()


@pytest.mark.parametrize("num_tokens", [16, 15, 9, 8, 1, 0])
def test_truncating_and_going_on_reads_the_new_tokens(num_tokens: int) -> None:
    """What was cut off is replaced for the request and kept for others."""
    checked = cache_of()
    lease = checked.begin(PROMPT)
    assert checked.finish(lease)

    assert checked.cache.truncate(lease, num_tokens)
    lease.append([7] * 9)
    assert lease.gaps == [Span(num_tokens, num_tokens + 9)]
    assert checked.finish(lease, 4)
    checked.check_lease(lease)
    lease.release()

    assert checked.gaps_of(PROMPT) == [(16, 18)]
    checked.assert_idle()


def test_truncating_what_is_not_computed_yet_computes_less() -> None:
    """The gap behind the cut is gone."""
    checked = cache_of()
    lease = checked.begin(PROMPT)
    assert checked.step(lease, 6)

    assert checked.cache.truncate(lease, 6)

    assert lease.gaps == []
    assert lease.chain.tokens() == PROMPT[:6]
    lease.release()
    checked.assert_idle()


def test_a_window_that_has_passed_cannot_be_truncated_into() -> None:
    """Tokens whose window is still held can be taken back, those before cannot."""
    checked = cache_of(full(), sliding(6))
    lease = checked.begin(PROMPT)
    assert checked.finish(lease, 4)

    assert not checked.cache.truncate(lease, 12)
    assert len(lease.chain) == 18
    assert checked.cache.truncate(lease, 17)
    lease.append([7, 7, 7])
    assert checked.finish(lease)

    lease.release()
    checked.assert_idle()


def test_a_chunk_that_was_never_held_cannot_be_truncated_into() -> None:
    """A request that begins at a chunk's start holds nothing of the chunk before."""
    checked = cache_of(full(), chunked(8))
    checked.warm(PROMPT)
    lease = checked.begin(PROMPT)
    assert lease.gaps == [Span(16, 18)]

    assert not checked.cache.truncate(lease, 13)
    assert lease.gaps == [Span(16, 18)]
    assert checked.cache.truncate(lease, 16)

    lease.release()
    checked.assert_idle()


def test_a_kept_state_inside_the_cut_is_not_used_again() -> None:
    """A lease that began from a state forgets it when tokens that the state has seen are cut."""
    checked = cache_of(full(), recurrent())
    lease = checked.begin(PROMPT)
    assert checked.finish(lease, 4)
    lease.release()
    lease = checked.begin(PROMPT)
    assert lease.gaps == [Span(16, 18)]
    assert checked.finish(lease)

    assert checked.cache.truncate(lease, 14)
    # The caller restores the state before the tokens that it takes back.
    prefixes = checked.store.prefixes(lease.chain)
    checked.store.slots[1][lease.states[1]] = [prefixes[14]]
    lease.append([7] * 6)

    assert checked.step(lease, 2)
    assert checked.step(lease, 4)
    checked.check_lease(lease)
    lease.release()
    checked.assert_idle()


@EVERY_MODEL
def test_a_preempted_request_goes_on_where_its_blocks_end(groups: tuple[GroupSpec, ...]) -> None:
    """Released in the middle of its prompt, a request finds again what it had published."""
    checked = cache_of(*groups)
    lease = checked.begin(PROMPT)
    assert checked.step(lease, 4)
    assert checked.step(lease, 4)
    assert checked.step(lease, 2)
    lease.release()
    checked.assert_idle()

    lease = checked.begin(PROMPT)

    assert lease.gaps == [Span(8, 18)]
    assert checked.finish(lease)
    lease.release()
    checked.assert_idle()


@pytest.mark.parametrize("span_tokens", [1, 3, 4, 9, 30])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@EVERY_MODEL
def test_a_request_alone_fits_into_the_blocks_it_is_said_to_need(
    groups: tuple[GroupSpec, ...], block_size: int, span_tokens: int
) -> None:
    """With exactly `blocks_needed`, any step of at most that many tokens has room."""
    spec = spec_of(*groups, block_size=block_size)
    room = cache_of(*groups, block_size=block_size).cache.blocks_needed(30, span_tokens)
    checked = CheckedCache(spec, room)

    for first in (0, 1, 2):
        lease = checked.begin([first, *range(29)])
        assert checked.finish(lease, span_tokens)
        lease.release()

    checked.assert_idle()


def test_a_request_alone_begins_even_where_sharing_leaves_no_room() -> None:
    """When the copy of a shared block would need one block more than there are, nothing is shared."""
    checked = cache_of(room=4)
    checked.warm(PROMPT[:16])

    lease = checked.begin([*PROMPT[:14], 1, 2])

    assert lease.gaps == [Span(0, 16)]
    assert checked.finish(lease)
    lease.release()
    checked.assert_idle()


def test_without_room_to_begin_nothing_is_forgotten() -> None:
    """A request that cannot begin leaves the cache as it was, in every group."""
    checked = CheckedCache(spec_of(full("a"), full("b")), [9, 6])
    checked.warm(PROMPT[:16])
    running = checked.begin([9] * 8)
    assert checked.finish(running)
    before = checked.snapshot()

    assert checked.reserve(PROMPT[:14]) is None

    assert checked.snapshot() == before
    running.release()
    assert checked.reserve(PROMPT[:14]) is not None


def test_without_room_to_go_on_nothing_changes() -> None:
    """An extension succeeds in every group or in none."""
    checked = CheckedCache(spec_of(full("a"), full("b")), [8, 4])
    checked.warm(PROMPT[:8])
    running = checked.begin([9] * 8)
    assert checked.finish(running)
    lease = checked.begin(PROMPT)
    before, gaps = checked.snapshot(), list(lease.gaps)

    assert not checked.cache.extend(lease, checked.front(lease, 100))

    assert checked.snapshot() == before
    assert lease.gaps == gaps
    running.release()
    assert not checked.cache.extend(lease, checked.front(lease, 100))
    assert checked.cache.extend(lease, checked.front(lease, 8))
    lease.release()
    checked.assert_idle()


def test_a_lease_closes_once_on_every_path() -> None:
    """Releasing twice does nothing, and a `with` block releases when it fails."""
    checked = cache_of()
    lease = checked.begin(PROMPT)
    assert checked.finish(lease)

    with pytest.raises(RuntimeError, match="step"), lease:
        raise RuntimeError("step")
    lease.release()

    assert not lease.is_open
    checked.assert_idle()


def test_appending_nothing_leaves_nothing_to_compute() -> None:
    """An empty append makes no gap."""
    checked = cache_of()
    lease = checked.begin(PROMPT)
    assert checked.finish(lease)

    lease.append([])

    assert lease.gaps == []
    assert lease.next_position == 18
    lease.release()


def test_a_lease_says_which_blocks_it_is_about_to_publish() -> None:
    """Others can wait for a block until its last token is computed, wherever the gap starts."""
    checked = cache_of()
    checked.warm(PROMPT[:16])
    lease = checked.begin(PROMPT[:6] + [1] * 8)
    keys = lease.chain.keys

    assert [lease.will_publish(number, keys[number]) for number in range(3)] == [False, True, True]
    assert not lease.will_publish(1, keys[2])
    assert not lease.will_publish(3, keys[2])
    assert checked.step(lease, 2)
    assert [lease.will_publish(number, keys[number]) for number in range(3)] == [False, False, True]
    lease.release()


def _hold_more(cache: KVCache, lease: Lease) -> None:
    lease.tables[0].blocks.append(BlockId(20))


def _lose_a_block(cache: KVCache, lease: Lease) -> None:
    lease.tables[0].blocks[0] = None


def _lose_the_lease(cache: KVCache, lease: Lease) -> None:
    cache._leases.clear()


def _swap_blocks(cache: KVCache, lease: Lease) -> None:
    blocks = lease.tables[0].blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def _swap_saved_and_running_state(cache: KVCache, lease: Lease) -> None:
    saved = lease.tables[1].blocks[3]
    assert saved is not None
    lease.tables[1].blocks[3], lease.states[1] = lease.states[1], saved


def _forget_the_state(cache: KVCache, lease: Lease) -> None:
    cache._ledgers[1].pool.release([lease.states.pop(1)])


def _forget_content(cache: KVCache, lease: Lease) -> None:
    cache._ledgers[0]._index.discard([lease.tables[0].place(2)])


@pytest.mark.parametrize(
    "damage",
    [
        _hold_more,
        _lose_a_block,
        _lose_the_lease,
        _swap_blocks,
        _swap_saved_and_running_state,
        _forget_the_state,
        _forget_content,
    ],
)
def test_verify_notices_drift(damage: Callable[[KVCache, Lease], None]) -> None:
    """What no call could do, done by hand, is reported in words."""
    checked = cache_of(full(), recurrent())
    lease = checked.begin(PROMPT)
    assert checked.finish(lease, 4)
    lease.release()
    lease = checked.begin(PROMPT)
    assert checked.cache.verify().ok

    damage(checked.cache, lease)

    report = checked.cache.verify()
    assert not report.ok
    assert all(problem.startswith("group ") for problem in report.problems)
    assert report.blocks_checked == 64
