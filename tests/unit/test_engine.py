"""The engine: what ends an output, who shares, what is refused, and what an error leaves behind."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.engine import Engine, FinishReason, Piece
from kvkeep.hf.install import install
from kvkeep.spec import RequestId
from kvkeep.testing.oracle import OracleRun, greedy, logits_at_all_positions
from kvkeep.testing.tiny_models import build_tiny

MODEL = build_tiny("llama")
ORACLE = build_tiny("llama")
BLOCK_SIZE = 8
PROMPT = [11, 7, 93, 45, 22, 8, 101, 64, 5, 77, 30, 12, 99, 54, 3, 40, 41, 9, 66, 21]
OTHER = [71, 70, 69, 68, 67, 66, 65, 64, 63, 62, 61, 60]
LONG = [*PROMPT, *OTHER, *PROMPT[::-1], *OTHER[::-1]]


class Letters:
    """A tokenizer whose tokens are single letters."""

    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(chr(ord("A") + token_id) for token_id in token_ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self.decode([ids])


def make_engine(eos_ids: Sequence[int] = (), **settings: Any) -> Engine:
    """An engine over the tiny llama, with NaN in all freed blocks."""
    options: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "capacity": "4MB",
        "poison": True,
        "self_test": False,
    }
    chosen = EngineSettings(**(options | settings))
    return Engine(install(MODEL, chosen), chosen, tokenizer=Letters(), eos_ids=eos_ids)


def greedily(**settings: Any) -> SamplingParams:
    """Settings that take the most likely token."""
    return SamplingParams(**({"temperature": 0, "max_tokens": 8} | settings))


def add(engine: Engine, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestId:
    """Queue a prompt."""
    return engine.add(prompt, params, CacheOptions(**options))


def drain(engine: Engine) -> list[Piece]:
    """All pieces until nothing is left to do."""
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    assert_nothing_is_held(engine)
    return pieces


def tokens_of(pieces: Sequence[Piece], request_id: RequestId, choice: int = 0) -> list[int]:
    """The tokens of one output."""
    own = [p for p in pieces if p.request_id == request_id and p.choice == choice]
    return [token for piece in own for token in piece.token_ids]


def complete(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, **options: Any
) -> list[Piece]:
    """The pieces of one prompt, alone."""
    add(engine, prompt, params, **options)
    return drain(engine)


def assert_nothing_is_held(engine: Engine) -> None:
    """Every lease is closed, the books are right, and nothing of a request is kept."""
    stats = engine.cache.stats()
    assert (stats.open_leases, stats.in_use_bytes) == (0, 0)
    assert engine.cache.verify().problems == ()
    assert engine._generations == {}
    assert engine._request_to_output == {}
    assert engine._scheduler.num_waiting + engine._scheduler.num_running == 0


@pytest.fixture(scope="module")
def truth() -> OracleRun:
    """What the model says after PROMPT."""
    return greedy(ORACLE, PROMPT, 8)


def text_of(token_ids: Sequence[int]) -> str:
    """The text that the tokenizer of these tests gives."""
    return Letters().decode(list(token_ids))


# --- what ends an output -------------------------------------------------------------------------


def test_max_tokens_of_zero_fills_the_cache_and_chooses_nothing() -> None:
    """One piece without tokens; the prompt is known afterwards."""
    engine = make_engine()

    (piece,) = complete(engine, PROMPT, greedily(max_tokens=0))

    assert (piece.token_ids, piece.finish_reason) == ((), FinishReason.LENGTH)
    assert piece.receipt is not None
    assert piece.receipt.output_tokens == 0
    assert engine.cache.coverage(engine.chain(PROMPT)).known_tokens == 16


@pytest.mark.parametrize("kind", ["eos", "stop_token"])
def test_an_end_token_ends_the_output(kind: str, truth: OracleRun) -> None:
    """The token is the last one of the output, and the reason is stop."""
    third = truth.token_ids[2]
    assert third not in truth.token_ids[:2]
    engine = make_engine([third] if kind == "eos" else [])
    params = greedily(stop_token_ids=[third] if kind == "stop_token" else [])

    pieces = complete(engine, PROMPT, params)

    assert tokens_of(pieces, RequestId(0)) == list(truth.token_ids[:3])
    assert pieces[-1].finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on_to_the_length(truth: OracleRun) -> None:
    """The end token is a token like any other, but a stop token still stops."""
    third, fifth = truth.token_ids[2], truth.token_ids[4]
    engine = make_engine([third])

    whole = complete(engine, PROMPT, greedily(ignore_eos=True))
    stopped = complete(engine, PROMPT, greedily(ignore_eos=True, stop_token_ids=[fifth]))

    assert tokens_of(whole, RequestId(0)) == list(truth.token_ids)
    assert whole[-1].finish_reason is FinishReason.LENGTH
    at = truth.token_ids.index(fifth) + 1
    assert tokens_of(stopped, RequestId(1)) == list(truth.token_ids[:at])


@pytest.mark.parametrize("kind", ["eos", "stop_token"])
def test_no_end_token_comes_before_the_least_number_of_tokens(kind: str, truth: OracleRun) -> None:
    """Another token is chosen in its place; the first token that may end the output does."""
    second = truth.token_ids[1]
    engine = make_engine([second] if kind == "eos" else [])
    stop_ids = [second] if kind == "stop_token" else []

    outputs = {
        least: tokens_of(
            complete(engine, PROMPT, greedily(min_tokens=least, stop_token_ids=stop_ids)),
            RequestId(at),
        )
        for at, least in enumerate((0, 1, 2, 8))
    }

    assert outputs[0] == outputs[1] == list(truth.token_ids[:2])
    assert outputs[2][0] == truth.token_ids[0]
    assert outputs[2][1] != second
    assert second not in outputs[8]
    assert len(outputs[8]) == 8


def test_a_stop_string_ends_nothing_before_the_least_number_of_tokens(truth: OracleRun) -> None:
    """It is text until then; one that is complete with the last token of them ends the output."""
    text = text_of(truth.token_ids)
    stop = text[2:4]
    engine = make_engine()

    def made(least: int) -> str:
        pieces = complete(engine, PROMPT, greedily(stop=stop, min_tokens=least))
        return "".join(piece.text for piece in pieces)

    without = {least: made(least) for least in range(9)}

    first = next(length for length in range(1, 9) if stop in text_of(truth.token_ids[:length]))
    assert text.count(stop) == 1
    assert {least for least, found in without.items() if found == text[: text.index(stop)]} == set(
        range(first + 1)
    )
    assert {without[least] for least in range(first + 1, 9)} == {text}


@pytest.mark.parametrize("includes", [False, True])
def test_a_stop_string_ends_the_text_before_or_behind_it(includes: bool, truth: OracleRun) -> None:
    """The string may span tokens; `include_stop` says whether it is in the text."""
    text = text_of(truth.token_ids)
    stop = text[2:4]
    engine = make_engine()

    pieces = complete(engine, PROMPT, greedily(stop=stop, include_stop=includes))

    end = text.index(stop) + (len(stop) if includes else 0)
    assert "".join(piece.text for piece in pieces) == text[:end]
    assert pieces[-1].finish_reason is FinishReason.STOP


def test_the_longest_context_ends_the_output(truth: OracleRun) -> None:
    """Prompt and output together never exceed max_context."""
    engine = make_engine(max_context=len(PROMPT) + 3)

    pieces = complete(engine, PROMPT, greedily())

    assert tokens_of(pieces, RequestId(0)) == list(truth.token_ids[:3])
    assert pieces[-1].finish_reason is FinishReason.LENGTH


# --- abort ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [0, 1, 3, 6])
def test_aborting_gives_everything_back(num_steps: int) -> None:
    """Waiting, in the middle of the prompt, or decoding: one last piece, and no block stays held."""
    engine = make_engine(max_batch_tokens=16)
    request_id = add(engine, LONG, greedily())
    for _ in range(num_steps):
        engine.step()

    (piece,) = engine.abort(request_id)

    assert piece.finish_reason is FinishReason.ABORT
    assert piece.receipt is not None
    assert not engine.has_work
    assert_nothing_is_held(engine)
    assert engine.abort(request_id) == []
    assert engine.abort(RequestId(12345)) == []


def test_what_an_aborted_request_had_computed_stays_known() -> None:
    """Three steps of 16 tokens are six blocks."""
    engine = make_engine(max_batch_tokens=16)
    request_id = add(engine, LONG, greedily())
    for _ in range(3):
        engine.step()
    engine.abort(request_id)

    assert engine.cache.coverage(engine.chain(LONG)).known_tokens == 48


def test_aborting_several_outputs_ends_all_of_them() -> None:
    """Each output of n=3 gets its last piece, and the receipt comes with the last one."""
    engine = make_engine()
    request_id = add(engine, PROMPT, SamplingParams(n=3, max_tokens=20, seed=1))
    engine.step()

    pieces = engine.abort(request_id)

    assert [(piece.choice, piece.receipt is None) for piece in pieces] == [
        (0, True),
        (1, True),
        (2, False),
    ]
    assert_nothing_is_held(engine)


# --- several outputs -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_requests", [8, 2, 1])
def test_several_outputs_share_the_prompt_and_equal_outputs_made_alone(max_requests: int) -> None:
    """Output k draws the numbers of seed and k, whether it forked, waited for a seat, or ran alone."""
    params = SamplingParams(n=4, max_tokens=12, seed=7)
    engine = make_engine(max_requests=max_requests)
    pieces = complete(engine, PROMPT, params)
    outputs = [tokens_of(pieces, RequestId(0), choice) for choice in range(4)]

    assert len({tuple(output) for output in outputs}) == 4
    assert all(len(output) == 12 for output in outputs)
    roomy = make_engine(max_requests=16)
    for choice, output in enumerate(outputs):
        assert replayed(roomy, params, choice) == output
    (receipt,) = [piece.receipt for piece in pieces if piece.receipt is not None]
    assert (receipt.prompt_tokens, receipt.output_tokens) == (len(PROMPT), 48)


def replayed(engine: Engine, params: SamplingParams, choice: int) -> list[int]:
    """Output `choice`, drawn token by token from the oracle's logits by a sampler of its own."""
    from kvkeep.engine.sampler import Sampler, SampleRow

    output: list[int] = []
    row = SampleRow.start(params, PROMPT, output, choice=choice)
    for _ in range(params.max_tokens):
        logits_V = logits_at_all_positions(ORACLE, [*PROMPT, *output])[-1]
        output.append(Sampler().sample(logits_V[None], [row])[0].token_id)
    return output


def test_forks_hold_the_blocks_of_the_prompt_together() -> None:
    """Four outputs of a prompt of six blocks take its full blocks once and a tail each."""
    engine = make_engine()
    add(engine, LONG, SamplingParams(n=4, max_tokens=3, seed=1))
    engine.step()
    engine.step()

    num_full = len(LONG) // BLOCK_SIZE
    assert engine.cache.stats().groups[0].in_use == num_full + 4
    drain(engine)


def test_a_request_for_many_outputs_leaves_a_seat_to_others() -> None:
    """Who comes while they run gets a token with the next step, not when they have ended."""
    engine = make_engine(max_requests=4)
    add(engine, PROMPT, SamplingParams(n=8, max_tokens=20, seed=1))
    engine.step()
    assert engine.num_running == 3

    other = add(engine, OTHER, SamplingParams(max_tokens=1))

    assert other in {piece.request_id for piece in engine.step()}
    assert {piece.choice for piece in drain(engine)} == set(range(8))


# --- repeatable ----------------------------------------------------------------------------------


def test_a_seed_repeats_alone_batched_and_preempted() -> None:
    """The choice depends on the seed and the place in the output, not on who else runs."""
    params = SamplingParams(max_tokens=12, seed=42)
    alone = tokens_of(complete(make_engine(), PROMPT, params), RequestId(0))
    engine = make_engine()
    request_id = add(engine, PROMPT, params)
    for seed in range(3):
        add(engine, OTHER, SamplingParams(max_tokens=12, seed=seed))
    batched = tokens_of(drain(engine), request_id)
    tight = make_engine(capacity=make_engine().cache.spec.block_bytes() * 8)
    add(tight, LONG[::-1][:36], SamplingParams(max_tokens=24, seed=1))
    preempted_id = add(tight, PROMPT, params)
    pieces = drain(tight)

    assert batched == alone
    assert tokens_of(pieces, preempted_id) == alone
    receipts = [p.receipt for p in pieces if p.request_id == preempted_id and p.receipt]
    assert receipts[0].num_preemptions >= 1
    other = tokens_of(
        complete(make_engine(), PROMPT, SamplingParams(max_tokens=12, seed=43)), RequestId(0)
    )
    assert other != alone


def test_logprobs_are_those_of_the_models_own_distribution() -> None:
    """As many alternatives as asked for, most likely first, equal to log_softmax without a cache."""
    engine = make_engine()
    plain = complete(engine, PROMPT, greedily(max_tokens=4))
    pieces = complete(engine, PROMPT, greedily(max_tokens=4, logprobs=3, temperature=1.0, seed=5))

    assert all(piece.sampled == () for piece in plain)
    output: list[int] = []
    for piece in pieces:
        (sampled,) = piece.sampled
        logprobs_V = logits_at_all_positions(ORACLE, [*PROMPT, *output])[-1].log_softmax(-1)
        top = logprobs_V.topk(3)
        assert [one.token_id for one in sampled.top] == top.indices.tolist()
        assert [one.logprob for one in sampled.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert sampled.logprob == pytest.approx(logprobs_V[sampled.token_id].item(), abs=1e-4)
        output += piece.token_ids
    assert len(output) == 4


# --- who shares ----------------------------------------------------------------------------------


def reused(engine: Engine, **options: Any) -> int:
    """Tokens of PROMPT that a request with these options finds in the cache."""
    receipt = complete(engine, PROMPT, greedily(), **options)[-1].receipt
    assert receipt is not None
    return receipt.reused_tokens


def test_a_salt_isolates() -> None:
    """Equal salts share, different ones and none at all do not."""
    engine = make_engine()

    first, second = reused(engine, salt="a"), reused(engine, salt="a")

    assert (first, second) == (0, len(PROMPT) - 1)
    assert reused(engine, salt="b") == 0
    assert reused(engine) == 0
    assert reused(engine, salt="b") == len(PROMPT) - 1


def test_a_request_may_read_without_writing_and_write_without_reading() -> None:
    """write=False leaves nothing behind; read=False computes all, and leaves it behind."""
    engine = make_engine()

    assert reused(engine, write=False) == 0
    assert reused(engine, write=False) == 0
    assert reused(engine, read=False) == 0
    assert reused(engine, read=False) == 0
    assert reused(engine, write=False) == len(PROMPT) - 1
