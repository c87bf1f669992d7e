"""Sessions as bookkeeping: what goes with them, what they turn away from."""

from collections.abc import Sequence

import pytest

from kvkeep.blocks import TokenChain
from kvkeep.cache.lifetimes import (
    Lifetimes,
    PinId,
    Query,
    SessionId,
    match,
)
from kvkeep.cache.lifetimes.relevance import common_blocks, is_turn
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey
from tests.lifetime_books import SIZE, Clock, chain, labels_of, made, root, serve


def test_what_goes_with_a_session(lifetimes: Lifetimes) -> None:
    """Only what it uses alone: not what another session, a request without session, or a pin keeps."""
    own, two, shared, pinned = (chain(1, number) for number in range(4))
    for tokens in (own, two, shared, pinned):
        serve(lifetimes, tokens, session="a")
    serve(lifetimes, two, session="b")
    serve(lifetimes, shared)
    lifetimes.pin(PinId("p"), root(), pinned.keys)
    query = Query(sessions=frozenset({"a"}), namespaces=frozenset({root()}))

    found = match(query, lifetimes.register, 1000.0)

    assert found.keys == set(own.keys)
    assert found.num_pinned == 1
    lifetimes.register.forget(found.keys)
    lifetimes.end_session(SessionId(root(), "a"))
    assert labels_of(lifetimes, two.keys[0]).sessions == {"b"}
    assert labels_of(lifetimes, pinned.keys[0]).sessions == frozenset()
    assert lifetimes.sessions.get(SessionId(root(), "a")) is None


def test_sessions_of_two_tenants_are_two(lifetimes: Lifetimes) -> None:
    """The same name under another salt is somebody else's."""
    serve(lifetimes, chain(1), session="a")
    serve(lifetimes, chain(1, salt="x"), session="a", salt="x")

    lifetimes.end_session(SessionId(root("x"), "a"))

    assert labels_of(lifetimes, chain(1).keys[0]).sessions == {"a"}
    assert len(lifetimes.sessions) == 1


def test_requests_of_a_closed_session_publish_nothing_any_more(lifetimes: Lifetimes) -> None:
    """Those that run, and those of a new session of the same name do."""
    tokens = chain(1)
    before = lifetimes.open(CacheOptions(session="a"), tokens)
    lifetimes.end_session(SessionId(root(), "a"))
    after = lifetimes.open(CacheOptions(session="a"), tokens)

    assert not before.publishes
    assert lifetimes.use(before, tokens, [0], is_new=True) == []
    assert after.publishes
    lifetimes.close(before, tokens)
    session = lifetimes.sessions.get(SessionId(root(), "a"))
    assert session is not None
    assert session.num_open == 1


def test_a_session_ends_so_long_after_its_last_use(clock: Clock) -> None:
    """Not while a request of it runs; a use begins the time anew."""
    lifetimes = made(clock, session_ttl_s=10.0)
    serve(lifetimes, chain(1), session="a")
    running = lifetimes.open(CacheOptions(session="b"), chain(1))
    assert lifetimes.sessions.due(1009.0) == []
    assert lifetimes.sessions.next_end == 1010.0

    clock.now_s = 1010.0
    assert lifetimes.sessions.due(1010.0) == [SessionId(root(), "a")]

    lifetimes.close(running)
    assert SessionId(root(), "b") not in lifetimes.sessions.due(1019.0)
    assert SessionId(root(), "b") in lifetimes.sessions.due(1020.0)


def test_a_claim_voided_by_a_purge_still_gives_its_session_back(clock: Clock) -> None:
    """Or its session would never end."""
    lifetimes = made(clock, session_ttl_s=10.0)
    claim = lifetimes.open(CacheOptions(session="a", tags=["t"]), chain(1))
    assert lifetimes.void(Query(tags=frozenset({"t"}))) == 1
    lifetimes.close(claim, chain(1))
    assert lifetimes.sessions.due(1010.0) == [SessionId(root(), "a")]


def test_a_fork_uses_all_that_its_parent_does(lifetimes: Lifetimes) -> None:
    """Closing either leaves the blocks to the other; the child goes on from the parent's last chain."""
    tokens = chain(3)
    serve(lifetimes, tokens, session="a", context="work")
    parent, child = SessionId(root(), "a"), SessionId(root(), "b")

    lifetimes.fork_session(parent, child)

    assert labels_of(lifetimes, tokens.keys[0]).sessions == {"a", "b"}
    forked = lifetimes.sessions.get(child)
    assert forked is not None
    assert list(forked.last_keys) == tokens.keys
    lifetimes.end_session(parent)
    assert labels_of(lifetimes, tokens.keys[0]).is_owned_by("b")


# --- what a session turns away from ------------------------------------------------------------------


def begun(lifetimes: Lifetimes, tokens: TokenChain, **options: object) -> list[BlockKey]:
    """What goes first because this request begins."""
    claim = lifetimes.open(CacheOptions(**options), tokens)  # type: ignore[arg-type]
    lifetimes.use(claim, tokens, range(len(tokens.keys)), is_new=False)
    left = lifetimes.begin(claim, tokens)
    lifetimes.close(claim, tokens)
    return left


def branch(*blocks: int) -> TokenChain:
    """A chain of blocks named by numbers."""
    return TokenChain(root(), SIZE, [number for number in blocks for _ in range(SIZE)])


def test_an_edited_history_leaves_the_abandoned_branch(lifetimes: Lifetimes) -> None:
    """Blocks of the last chain that the new one does not have, and that nobody else uses."""
    old = branch(1, 2, 3, 4)
    begun(lifetimes, old, session="a")
    serve(lifetimes, branch(1, 2, 3), session="b")

    assert begun(lifetimes, branch(1, 2, 9), session="a") == [old.keys[3]]


def test_an_unrelated_request_of_a_session_abandons_nothing(lifetimes: Lifetimes) -> None:
    """Such as one that asks for a title: it has no block in common with the conversation."""
    begun(lifetimes, branch(1, 2, 3), session="a")

    assert begun(lifetimes, branch(7, 8), session="a") == []


def test_another_context_leaves_what_only_the_old_one_used(lifetimes: Lifetimes) -> None:
    """The system prompt is used by both; what another session uses stays too."""
    work, home = branch(1, 2, 3, 4), branch(1, 8, 9)
    begun(lifetimes, work, session="a", context="work")
    serve(lifetimes, branch(1, 2), session="b")
    assert begun(lifetimes, branch(1, 2, 3, 4, 5), session="a", context="work") == []

    left = begun(lifetimes, home, session="a", context="home")

    assert set(left) == set(branch(1, 2, 3, 4, 5).keys[2:])


def test_auto_sees_a_turn_and_no_false_ones(lifetimes: Lifetimes) -> None:
    """A growing conversation, a pasted document and a shortened history are none; a new subject is."""
    talk = [branch(1, 2), branch(1, 2, 3), branch(1, 2, 3, *range(10, 30)), branch(1, 2, 3)]
    names = []
    for tokens in [*talk, branch(1, 8, 9, 7), branch(1, 8, 9, 7, 6)]:
        claim = lifetimes.open(CacheOptions(session="a", context="auto"), tokens)
        names.append(claim.context)
        lifetimes.close(claim, tokens)

    assert names == ["auto:1"] * 4 + ["auto:2"] * 2


def test_a_turn_is_measured_on_the_shorter_chain() -> None:
    """Just below the share it is a turn, at the share it is none; with nothing to compare neither."""
    last = branch(1, 2, 3, 4).keys
    assert common_blocks(last, branch(1, 2, 9).keys) == 2
    assert turns(last, branch(1, 9, 9).keys)
    assert not turns(last, branch(1, 2, 9, 9).keys)
    assert not turns(last, ())
    assert not turns((), last)
    for number in range(5):
        assert common_blocks(last, branch(*[1, 2, 3, 4][:number], 9, 9).keys) == number


def test_what_others_use_too_says_nothing_of_a_turn() -> None:
    """Behind a long system prompt a new subject is a turn, and a prompt that is no longer than it is none."""
    last = branch(1, 2, 3, 4, 5).keys
    assert not turns(last, branch(1, 2, 3, 9, 9).keys)
    assert turns(last, branch(1, 2, 3, 9, 9).keys, shared=last[:3])
    assert not turns(last, branch(1, 2, 3, 4, 9).keys, shared=last[:3])
    assert not turns(last, branch(1, 2, 3).keys, shared=last[:3])
    assert turns(last, branch(9, 2, 3, 4).keys, shared=last[:3])
    assert not turns(last, branch(8, 8, 8, 8, 8, 8).keys, shared=last)


def turns(
    last: Sequence[BlockKey], new: Sequence[BlockKey], *, shared: Sequence[BlockKey] = ()
) -> bool:
    """Whether it is a turn when half is to be kept."""
    return is_turn(last, new, 0.5, is_shared=set(shared).__contains__)


def test_a_system_prompt_that_others_use_hides_no_turn(lifetimes: Lifetimes) -> None:
    """As long as a session is alone, all it has counts as its own."""

    def contexts(session: str, *subjects: int) -> list[str | None]:
        chains = [branch(1, 2, 3, subject) for subject in subjects]
        return [serve(lifetimes, one, session=session, context="auto").context for one in chains]

    assert contexts("alone", 4, 5) == ["auto:1", "auto:1"]
    assert contexts("beside", 6, 6, 7) == ["auto:1", "auto:1", "auto:2"]


@pytest.mark.parametrize("options", [{"write": False}, {"ttl": 0}])
def test_a_request_that_leaves_nothing_turns_nothing(
    lifetimes: Lifetimes, options: dict[str, object]
) -> None:
    """Such as one for a title, in the middle of a conversation: what that uses stays where it is."""
    talk = branch(1, 2, 3)
    begun(lifetimes, talk, session="a", context="auto")

    assert begun(lifetimes, branch(1, 7, 8, 9), session="a", context="auto", **options) == []
    assert serve(lifetimes, talk, session="a", context="auto").context == "auto:1"
    assert begun(lifetimes, branch(1, 7, 8, 9), session="a", context="auto") == talk.keys[1:]
