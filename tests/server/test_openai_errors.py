"""Chats that cannot be answered, or end before their time: refused by name, told late, or left."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.openai_calls import QUESTION, ask, cached_tokens, events_of, official_client
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with official_client(server) as found:
        yield found


@pytest.mark.parametrize(
    ("options", "param", "word"),
    [
        ({"temperature": -1}, "temperature", "out of range"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"n": 0}, "n", "1"),
        ({"stop": [""]}, "stop", "at least one character"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "is no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "out of range"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "system"),
        ({"extra_body": {"best_of": 4}}, "best_of", "not supported"),
        ({"extra_body": {"guided_json": {"a": {}}}}, "guided_json", "{'a': {}}"),
        ({"extra_body": {"kv_cache": {"ttl": "soon"}}}, "kv_cache.ttl", "no length of time"),
        ({"extra_body": {"kv_cache": {"pin": "yes"}}}, "kv_cache.pin", "bool"),
        ({"modalities": ["text", "audio"]}, "modalities", "['text', 'audio'] is not supported"),
        (
            {"extra_body": {"bad_words": ["x"] * 99}},
            "bad_words",
            "['x', 'x', 'x', 'x', 'x', 'x', ...]",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
        (
            {"extra_body": {"cache_control": {"type": "permanent"}}},
            "cache_control.type",
            "ephemeral",
        ),
    ],
)
def test_a_request_that_cannot_be_followed_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str, word: str
) -> None:
    """400 in the protocol's shape, with the field and what is wrong with it."""
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)

    assert caught.value.param == param
    assert word in caught.value.message
    assert caught.value.type == "invalid_request_error"


def test_images_are_refused(client: openai.OpenAI) -> None:
    """A part that is no text is no text."""
    image = {"type": "image_url", "image_url": {"url": "data:"}}

    with pytest.raises(openai.BadRequestError, match="text only"):
        ask(client, messages=[{"role": "user", "content": [image]}])


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    """404 with the code that clients look for."""
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-4o")

    assert caught.value.code == "model_not_found"


def test_a_prompt_beyond_the_context_is_refused_with_its_code(client: openai.OpenAI) -> None:
    """Also when a stream was asked for: the status is an error, not a stream with one."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "word " * 20_000}],
                stream=stream,
            )

        assert caught.value.code == "context_length_exceeded"


def test_a_client_that_leaves_ends_its_request(
    server: RunningServer, client: openai.OpenAI
) -> None:
    """Closing a stream in its middle frees the engine; what was computed stays cached."""
    stream = client.chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True, "cache_salt": "leaver"},
    )
    next(stream)

    stream.close()

    wait_until(lambda: server.service.engine.num_open == 0, "the request has ended")
    again = ask(client, extra_body={"cache_salt": "leaver"})
    assert cached_tokens(again) > 0


def test_a_client_that_leaves_an_answer_ends_its_request_too(server: RunningServer) -> None:
    """Without a stream the connection is watched while the answer is computed."""
    body = {"messages": QUESTION, "max_tokens": 4000, "ignore_eos": True}
    with server.client() as plain, pytest.raises(httpx.ReadTimeout):
        plain.post("/v1/chat/completions", json=body, timeout=0.5)

    wait_until(lambda: server.service.engine.num_open == 0, "the request has ended")


def test_a_silent_stream_keeps_its_connection_alive_and_late_errors_are_told() -> None:
    """Comments come while nothing else does; an error after the start is an event, then the end."""
    with running_server(keep_alive_s=0.0001, request_timeout_s=0.6) as hasty:
        body = {"messages": QUESTION, "max_tokens": 7000, "ignore_eos": True, "stream": True}
        with hasty.client() as plain:
            response = plain.post("/v1/chat/completions", json=body)

        assert response.status_code == 200
        assert "\n\n: keep-alive\n\n" in "\n\n" + response.text
        last = events_of(response)[-1]
        assert last["error"]["code"] == "timeout"
        with official_client(hasty) as client:
            stream = client.chat.completions.create(
                model="tiny",
                messages=QUESTION,
                max_tokens=7000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            with pytest.raises(openai.APIError) as caught:
                list(stream)
        assert caught.value.code == "timeout"
