"""What the engine refuses, and what a fault of the model leaves behind."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeep.config import SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.errors import CapacityError, KVKeepError, RequestError
from kvkeep.hf.paged_model import Work
from kvkeep.spec import RequestId
from kvkeep.testing.oracle import OracleRun, greedy
from kvkeep.testing.tiny_models import VOCAB_SIZE
from tests.unit.test_engine import (
    LONG,
    ORACLE,
    OTHER,
    PROMPT,
    add,
    assert_nothing_is_held,
    complete,
    drain,
    greedily,
    make_engine,
    tokens_of,
)


@pytest.fixture(scope="module")
def truth() -> OracleRun:
    """What the model says after PROMPT."""
    return greedy(ORACLE, PROMPT, 8)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt has 0 tokens; give at least one"),
        ([5, VOCAB_SIZE], "prompt has token id 128, but the model knows ids below 128"),
        ([5, -1], "not token ids"),
        (["a"], "not token ids"),
        ([5] * 64, "prompt has 64 tokens, but the longest context is 64"),
    ],
    ids=["empty", "beyond the vocabulary", "negative", "no number", "too long"],
)
def test_a_malformed_prompt_is_refused_with_its_numbers(
    prompt: Sequence[int], message: str
) -> None:
    """Nothing of it is kept, and the next one is served."""
    engine = make_engine(max_context=64)

    with pytest.raises(RequestError, match=message):
        add(engine, prompt, greedily())

    assert_nothing_is_held(engine)
    assert len(tokens_of(complete(engine, PROMPT, greedily()), RequestId(0))) == 8


def test_a_prompt_of_the_whole_context_can_be_cached() -> None:
    """Without output there is no need for a place behind the prompt."""
    engine = make_engine(max_context=64)

    assert complete(engine, [5] * 64, greedily(max_tokens=0))[-1].receipt is not None


def test_what_can_never_fit_is_refused_with_its_numbers() -> None:
    """The error says how many blocks are needed and how many there are."""
    engine = make_engine(capacity=make_engine().cache.spec.block_bytes() * 5)

    with pytest.raises(
        CapacityError, match=r"36 tokens \(prompt 20, max_tokens 16\).* needs 5 blocks"
    ) as caught:
        add(
            make_engine(capacity=make_engine().cache.spec.block_bytes() * 4),
            PROMPT,
            greedily(max_tokens=16),
        )

    assert "which has 4" in str(caught.value)
    assert len(tokens_of(complete(engine, PROMPT, greedily(max_tokens=16)), RequestId(0))) == 16


# --- faults of the model -------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """What a device raises."""


def test_an_error_of_the_model_ends_its_batch_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, truth: OracleRun
) -> None:
    """Requests that were not in the batch are served as if nothing had been; nothing is leaked."""
    engine = make_engine(max_requests=3)
    failing = [add(engine, OTHER, SamplingParams(n=2, max_tokens=9)), add(engine, LONG, greedily())]
    waiting = add(engine, PROMPT, greedily())
    engine.step()
    engine.step()

    def fail(*_args: Any) -> Tensor:
        raise OutOfMemoryError("the device is full")

    with monkeypatch.context() as broken:
        broken.setattr(engine.installed.paged, "forward", fail)
        with pytest.raises(OutOfMemoryError):
            engine.step()
    assert engine.cache.verify().ok
    pieces = drain(engine)

    ended = {p.request_id: p.finish_reason for p in pieces if p.receipt is not None}
    assert ended == {
        failing[0]: FinishReason.ERROR,
        failing[1]: FinishReason.ERROR,
        waiting: FinishReason.LENGTH,
    }
    assert tokens_of(pieces, waiting) == list(truth.token_ids)


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_logits_of_nan_end_their_request_only(
    num_outputs: int, monkeypatch: pytest.MonkeyPatch, truth: OracleRun
) -> None:
    """The other requests of the batch get their tokens."""
    engine = make_engine()
    bad = add(engine, OTHER, SamplingParams(n=num_outputs, max_tokens=9, seed=1))
    good = add(engine, PROMPT, greedily())
    forward = engine.installed.paged.forward

    def spoil(work: Sequence[Work]) -> Tensor:
        logits_RV = forward(work).clone()
        wanting = [item for item in work if item.wants_logits]
        for row, item in enumerate(wanting):
            if item.lease.chain.tokens()[: len(OTHER)] == OTHER:
                logits_RV[row] = torch.nan
        return logits_RV

    monkeypatch.setattr(engine.installed.paged, "forward", spoil)
    pieces = drain(engine)

    reasons = [p.finish_reason for p in pieces if p.request_id == bad]
    assert reasons == [FinishReason.ERROR] * num_outputs
    assert tokens_of(pieces, good) == list(truth.token_ids)


def test_errors_are_errors_of_kvkeep() -> None:
    """A caller can catch all of them at once."""
    assert issubclass(RequestError, KVKeepError)
    assert issubclass(CapacityError, KVKeepError)
