"""What fails behind the model ends the output that it belongs to; the others of the batch lose nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kvkeep.cache import Lease
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import Engine, FinishReason, Piece
from kvkeep.spec import RequestId, Span
from kvkeep.testing.oracle import OracleRun, greedy
from tests.unit.test_engine import (
    ORACLE,
    OTHER,
    PROMPT,
    Letters,
    add,
    assert_nothing_is_held,
    complete,
    drain,
    greedily,
    make_engine,
    tokens_of,
)

_BAD_TOKEN = 127


class MishapError(RuntimeError):
    """What a part of the engine raises."""


class FragileLetters(Letters):
    """A tokenizer that one token breaks, for ever."""

    def decode(self, token_ids: list[int], **options: bool) -> str:
        if _BAD_TOKEN in token_ids:
            raise MishapError("no text for it")
        return super().decode(token_ids, **options)


class FragileGrammar:
    """A grammar that breaks behind the second token."""

    failure = None

    def __init__(self) -> None:
        self._num_tokens = 0

    def matcher(self) -> "FragileGrammar":
        return FragileGrammar()

    def accept(self, token_ids: Sequence[int]) -> None:
        self._num_tokens += len(token_ids)

    def allowed(self) -> bytes:
        if self._num_tokens == 2:
            raise MishapError("the grammar is broken")
        return b"\xff" * 16


@pytest.fixture(scope="module")
def truth() -> OracleRun:
    """What the model says after PROMPT."""
    return greedy(ORACLE, PROMPT, 8)


def fails(*_arguments: Any, **_options: Any) -> None:
    """Stands in for a part that is broken."""
    raise MishapError("it is broken")


def endings(pieces: Sequence[Piece], request_id: RequestId) -> dict[int, FinishReason]:
    """Why each output of a request ended."""
    return {
        piece.choice: piece.finish_reason
        for piece in pieces
        if piece.request_id == request_id and piece.finish_reason is not None
    }


def assert_goes_on(engine: Engine, truth: OracleRun) -> None:
    """The next request is served as ever."""
    pieces = complete(engine, PROMPT, greedily())
    assert tokens_of(pieces, pieces[0].request_id) == list(truth.token_ids)


def test_a_token_that_breaks_the_tokenizer_ends_its_output_alone(truth: OracleRun) -> None:
    """Outputs before and behind it in the batch get all their tokens, in the same step."""
    engine = make_engine()
    engine._tokenizer = FragileLetters()
    before = add(engine, PROMPT, greedily())
    bad = add(engine, OTHER, greedily(logit_bias={_BAD_TOKEN: 100}))
    behind = add(engine, PROMPT[::-1], greedily())

    pieces = drain(engine)

    assert endings(pieces, bad) == {0: FinishReason.ERROR}
    assert tokens_of(pieces, bad) == []
    assert tokens_of(pieces, before) == list(truth.token_ids)
    assert tokens_of(pieces, behind) == list(greedy(ORACLE, PROMPT[::-1], 8).token_ids)
    assert_goes_on(engine, truth)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_a_grammar_that_breaks_ends_its_request_alone(num_outputs: int, truth: OracleRun) -> None:
    """What was chosen before is given out."""
    engine = make_engine()
    bad = add(engine, OTHER, greedily(grammar=FragileGrammar(), n=num_outputs))
    good = add(engine, PROMPT, greedily())

    pieces = drain(engine)

    choices = range(num_outputs)
    assert endings(pieces, bad) == dict.fromkeys(choices, FinishReason.ERROR)
    assert [len(tokens_of(pieces, bad, choice)) for choice in choices] == [2] * num_outputs
    assert tokens_of(pieces, good) == list(truth.token_ids)


def test_a_commit_that_fails_ends_its_prompt_alone(
    monkeypatch: pytest.MonkeyPatch, truth: OracleRun
) -> None:
    """The rows of the others' logits stay theirs."""
    engine = make_engine()
    commit = engine.cache.commit

    def fails_for_other(lease: Lease, spans: Sequence[Span]) -> None:
        if lease.chain.tokens()[: len(OTHER)] == OTHER and len(lease.chain) == len(OTHER) + 2:
            raise MishapError("no place")
        commit(lease, spans)

    monkeypatch.setattr(engine.cache, "commit", fails_for_other)
    bad = add(engine, OTHER, SamplingParams(n=2, max_tokens=8, seed=3))
    many = add(engine, PROMPT[::-1], greedily(n=2))
    good = add(engine, PROMPT, greedily())

    pieces = drain(engine)

    assert endings(pieces, bad) == {0: FinishReason.ERROR, 1: FinishReason.ERROR}
    expected = list(greedy(ORACLE, PROMPT[::-1], 8).token_ids)
    assert [tokens_of(pieces, many, choice) for choice in (0, 1)] == [expected, expected]
    assert tokens_of(pieces, good) == list(truth.token_ids)


def test_a_fork_that_fails_ends_its_prompt_alone(
    monkeypatch: pytest.MonkeyPatch, truth: OracleRun
) -> None:
    """Its logits are nobody else's, however many forks take theirs."""
    engine = make_engine()
    fork = engine.cache.fork

    def fails_for_other(lease: Lease) -> Lease | None:
        if lease.chain.tokens() == OTHER:
            raise MishapError("no table")
        return fork(lease)

    monkeypatch.setattr(engine.cache, "fork", fails_for_other)
    bad = add(engine, OTHER, greedily(n=2))
    good = add(engine, PROMPT, greedily(n=2))

    pieces = drain(engine)

    assert endings(pieces, bad) == {0: FinishReason.ERROR}
    tokens = [tokens_of(pieces, good, choice) for choice in (0, 1)]
    assert tokens == [list(truth.token_ids)] * 2


@pytest.mark.parametrize(
    "breaks",
    [
        lambda engine, patch: patch.setattr(engine._explaining, "explain", fails),
        lambda engine, patch: patch.setattr(engine._explaining.history, "remember", fails),
        lambda engine, patch: patch.setattr(engine.cache.lifetimes.register, "first_end", fails),
        lambda engine, patch: patch.setattr(engine._costs, "saved_s", fails),
        lambda engine, patch: patch.setattr(engine.cache._upkeep, "keep_quotas", fails),
    ],
    ids=["explaining", "remembering", "expiry", "measuring", "quotas"],
)
def test_what_fails_beside_an_output_loses_none_of_it(
    breaks: Callable[[Engine, pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    truth: OracleRun,
) -> None:
    """All tokens come, the last piece too, and nothing is held."""
    engine = make_engine()
    with monkeypatch.context() as broken:
        breaks(engine, broken)
        one = engine.add(PROMPT, greedily(), CacheOptions(session="one"), explains=True)
        pieces = drain(engine)

    assert tokens_of(pieces, one) == list(truth.token_ids)
    assert pieces[-1].receipt is not None
    assert_goes_on(engine, truth)


@pytest.mark.parametrize("part", ["look_up", "tokenizer"])
def test_a_request_that_cannot_be_added_leaves_no_claim(
    part: str, monkeypatch: pytest.MonkeyPatch, truth: OracleRun
) -> None:
    """Its session is not open, so that it ends by its time."""
    engine = make_engine()
    with monkeypatch.context() as broken:
        if part == "look_up":
            broken.setattr(engine.cache, "look_up", fails)
        else:
            broken.setattr(engine, "_tokenizer", FragileLetters())
        with pytest.raises(MishapError):
            engine.add([*PROMPT, _BAD_TOKEN], greedily(), CacheOptions(session="one"))

    assert all(one.num_running == 0 for one in engine.cache.administration.sessions())
    assert engine.cache.lifetimes._claims == {}
    assert_nothing_is_held(engine)
    assert_goes_on(engine, truth)
