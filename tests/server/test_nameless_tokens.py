"""A model whose table is longer than its vocabulary: ids without a name harm nobody."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import PreTrainedModel

from kvkeep import LLM
from kvkeep.hf.load import load_model
from tests.running_server import RunningServer, running_server

TABLE = 3200  # the tokenizer has 3,072
NAMELESS = 3100
COMPLETIONS = "/v1/completions"
NAMELESS_ONLY = {
    "model": "tiny",
    "prompt": "hi there",
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
    "logit_bias": {str(NAMELESS): 100},
}
VICTIM = {
    "model": "tiny",
    "prompt": "The harbour of",
    "max_tokens": 150,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def padded() -> Iterator[RunningServer]:
    """A server of the bundled model with a longer table."""
    loaded = load_model("tiny")
    model: PreTrainedModel = loaded.model
    model.resize_token_embeddings(TABLE)
    with running_server(LLM(model, loaded.tokenizer, capacity="64MB")) as running:
        yield running


def answered(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The one answer to a completion."""
    with server.client() as client:
        response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_an_id_without_a_name_has_no_text(padded: RunningServer) -> None:
    """It counts as a token, with logprobs or without, and a stream of it ends."""
    plain = answered(padded, NAMELESS_ONLY)
    reported = answered(padded, {**NAMELESS_ONLY, "logprobs": 2})

    for found in (plain, reported):
        assert found["choices"][0]["text"] == ""
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 12


def test_a_stream_beside_ids_without_a_name_loses_nothing(padded: RunningServer) -> None:
    """It has the tokens that it has alone."""
    alone = answered(padded, VICTIM)

    with ThreadPoolExecutor(5) as pool:
        victim = pool.submit(answered, padded, VICTIM)
        others = [pool.submit(answered, padded, NAMELESS_ONLY) for _ in range(4)]
        found, ended = victim.result(), [one.result() for one in others]

    assert found["choices"][0]["text"] == alone["choices"][0]["text"]
    assert found["usage"]["completion_tokens"] == 150
    assert [one["usage"]["completion_tokens"] for one in ended] == [12] * 4


def test_the_hottest_choice_is_answered(padded: RunningServer) -> None:
    """At this temperature every id is as likely as another, those without a name too."""
    body = {**VICTIM, "temperature": 1000, "seed": 7, "n": 4}

    assert answered(padded, body)["usage"]["completion_tokens"] == 600


@pytest.mark.parametrize(
    "prompt", [[*range(5, 99), NAMELESS], [NAMELESS] * 70, [NAMELESS, *range(5, 99)]]
)
def test_a_prompt_may_hold_ids_without_a_name(padded: RunningServer, prompt: list[int]) -> None:
    """The model has a row for them. Nothing of the request is open afterwards."""
    body = {**VICTIM, "prompt": prompt, "max_tokens": 5, "kv_cache": {"session": "nameless"}}

    assert answered(padded, body)["usage"]["completion_tokens"] == 5

    with padded.client() as client:
        (session,) = client.get("/v1/cache/sessions").json()["data"]
    assert session["running"] == 0


def test_an_id_behind_the_table_is_refused(padded: RunningServer) -> None:
    """No row of the model stands for it."""
    with padded.client() as client:
        response = client.post(COMPLETIONS, json={**VICTIM, "prompt": [5, TABLE]})

    assert response.status_code == 400
    assert "ids below 3200" in response.json()["error"]["message"]
