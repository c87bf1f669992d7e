"""The Anthropic SDK against a running server: what it sends is understood, what it reads is right."""

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Message

from kvkeep.config import SamplingParams
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

SYSTEM = "You answer questions about cats and dogs. " * 12
QUESTION = "Which of them sleeps more?"
KEY = "first-secret-key"
MAX_TOKENS = 24
BLOCK = 32
_HOUR = {"type": "ephemeral", "ttl": "1h"}
_MINUTES = {"type": "ephemeral"}


def asked(
    question: str = QUESTION,
    system: str = SYSTEM,
    body: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A request that always has the same answer; `body` are fields that the SDK does not know."""
    return {
        "model": "tiny",
        "max_tokens": MAX_TOKENS,
        "extra_body": {"temperature": 0, **(body or {})},
        "system": system,
        "messages": [{"role": "user", "content": question}],
        **more,
    }


def said(message: Message) -> str:
    """The text of a message."""
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The same model without a server."""
    with LLM("tiny", capacity="64MB") as llm:
        yield llm


@pytest.fixture(scope="module")
def answer(llm: LLM) -> str:
    """What the model answers."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTION},
    ]
    return llm.chat(messages, SamplingParams(max_tokens=MAX_TOKENS, temperature=0)).text


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Anthropic]:
    """The SDK's client, which sends some key although none is set."""
    with Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict() -> Iterator[RunningServer]:
    """A server with a key, little patience and frequent signs of life."""
    with running_server(api_keys=[KEY], request_timeout_s=1.0, keep_alive_s=0.005) as running:
        yield running


def test_an_answer_is_that_of_the_model(client: Anthropic, answer: str) -> None:
    """Text, ids, roles and reasons are where the SDK looks for them."""
    message = client.messages.create(**asked())

    assert said(message) == answer
    assert (message.role, message.type, message.model) == ("assistant", "message", "tiny")
    assert message.id.startswith("msg_")
    assert message.stop_reason in {"end_turn", "max_tokens"}
    assert message.stop_sequence is None


def test_usage_counts_what_was_read_and_written(client: Anthropic) -> None:
    """The first request writes, the second reads it; both add up to the counted prompt."""
    request = asked(system="Birds are not the subject here. " * 20)
    prompt = {name: request[name] for name in ("model", "system", "messages")}
    num_prompt = client.messages.count_tokens(**prompt).input_tokens

    first = client.messages.create(**request).usage
    second = client.messages.create(**request).usage

    for usage in (first, second):
        read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        assert read is not None
        assert written is not None
        assert usage.input_tokens + read + written == num_prompt
    assert first.cache_creation_input_tokens
    # The second also reads the end of the prompt, which became a full block with the answer.
    assert second.cache_read_input_tokens >= first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0


@pytest.mark.parametrize(
    ("where", "mark", "field"),
    [
        ("top", _MINUTES, "ephemeral_5m_input_tokens"),
        ("top", _HOUR, "ephemeral_1h_input_tokens"),
        ("system", _HOUR, "ephemeral_1h_input_tokens"),
        ("message", _MINUTES, "ephemeral_5m_input_tokens"),
    ],
)
def test_a_mark_gives_the_lifetime(
    client: Anthropic, where: str, mark: dict[str, Any], field: str
) -> None:
    """Where a mark may stand, its lifetime holds, and usage says so."""
    system, question = f"Marked {where} {field}. " * 15, "Is that so?"
    request: dict[str, Any] = asked(question, system)
    if where == "top":
        request["cache_control"] = mark
    elif where == "system":
        request["system"] = [{"type": "text", "text": system, "cache_control": mark}]
    else:
        block = {"type": "text", "text": question, "cache_control": mark}
        request["messages"] = [{"role": "user", "content": [block]}]

    usage = client.messages.create(**request).usage

    assert usage.cache_creation is not None
    assert usage.cache_creation_input_tokens
    assert getattr(usage.cache_creation, field) == usage.cache_creation_input_tokens


def test_marks_do_not_change_the_prompt(client: Anthropic) -> None:
    """A breakpoint that moves to the next turn leaves what is before it in place."""
    system = "Marks are no part of the text. " * 20
    plain = client.messages.create(**asked(system=system)).usage
    block = {"type": "text", "text": system, "cache_control": _MINUTES}

    marked = client.messages.create(**asked() | {"system": [block]}).usage

    assert plain.cache_creation_input_tokens
    assert marked.cache_read_input_tokens >= plain.cache_creation_input_tokens


def test_a_stream_adds_up_to_the_message(client: Anthropic, answer: str) -> None:
    """The SDK's own adding up gives what comes without a stream, counts included."""
    client.messages.create(**asked())  # what both read then
    whole = client.messages.create(**asked())
    with client.messages.stream(**asked()) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert text == said(final) == answer
    assert final.stop_reason == whole.stop_reason
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_stream_says_at_its_start_what_was_read(client: Anthropic) -> None:
    """New, then read: its first event has the counts of its end, before anything is said."""
    system = "Fish are no birds, and birds are no fish. " * 20
    for is_read in (False, True):
        with client.messages.stream(**asked(system=system)) as stream:
            started = next(iter(stream))
            final = stream.get_final_message().usage

        assert started.type == "message_start"
        usage = started.message.usage
        read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        assert read is not None
        assert written is not None
        assert (read > 4 * BLOCK, written > 4 * BLOCK) == (is_read, not is_read)
        for count in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
            assert getattr(usage, count) == getattr(final, count)
        assert usage.output_tokens == 0


def test_the_events_of_a_stream_are_in_order(client: Anthropic) -> None:
    """One block of text between the start and the end of the message."""
    kinds = [event.type for event in client.messages.create(**asked(), stream=True)]

    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


async def _async_answers(url: str) -> tuple[str, str]:
    async with AsyncAnthropic(base_url=url, api_key="any", max_retries=0) as client:
        whole = said(await client.messages.create(**asked()))
        async with client.messages.stream(**asked()) as stream:
            streamed = "".join([text async for text in stream.text_stream])
        return whole, streamed


def test_the_asynchronous_client_gets_the_same(server: RunningServer, answer: str) -> None:
    """At once and as a stream."""
    assert asyncio.run(_async_answers(server.url)) == (answer, answer)


def test_a_stop_sequence_ends_the_answer_and_is_named(client: Anthropic, answer: str) -> None:
    """The text ends before it, in a stream as well."""
    sequence = answer[len(answer) // 2 :][:4]
    expected = answer[: answer.index(sequence)]
    request = asked(stop_sequences=["never said", sequence])

    message = client.messages.create(**request)
    with client.messages.stream(**request) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", sequence)
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", sequence)
    assert said(message) == streamed == expected


def test_too_few_tokens_are_said_to_be_the_reason(client: Anthropic) -> None:
    """A client that sees max_tokens asks for more."""
    message = client.messages.create(**asked() | {"max_tokens": 2})

    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 2


def test_no_tokens_only_fill_the_cache(client: Anthropic) -> None:
    """A prompt is computed ahead, and the next request finds it."""
    request = asked(system="This was computed ahead of time. " * 15)

    warm = client.messages.create(**request | {"max_tokens": 0})
    after = client.messages.create(**request)

    assert warm.content == []
    assert warm.usage.output_tokens == 0
    assert warm.usage.cache_creation_input_tokens
    assert after.usage.cache_read_input_tokens >= warm.usage.cache_creation_input_tokens


def test_an_answer_goes_on_where_it_was_begun(client: Anthropic, llm: LLM) -> None:
    """Text of a last turn of the assistant is the beginning of the answer."""
    begun = "Cats"
    prompt = [
        *llm.encode_chat([{"role": "user", "content": QUESTION}]),
        *llm.encode(begun),
    ]
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    expected = llm.generate([prompt], params)[0].text
    request = asked()
    request["messages"].append({"role": "assistant", "content": begun})
    del request["system"]

    message = client.messages.create(**request)

    assert said(message) == expected


def test_tools_that_may_not_be_called_need_no_template(client: Anthropic, answer: str) -> None:
    """With tool_choice none a model whose template says nothing of tools can answer."""
    tools = [{"name": "f", "input_schema": {"type": "object"}}]

    message = client.messages.create(**asked(tools=tools, tool_choice={"type": "none"}))

    assert said(message) == answer


def test_what_is_ignored_is_said_in_a_header(client: Anthropic) -> None:
    """Fields of other servers do no harm, and do not go unnoticed."""
    raw = client.messages.with_raw_response.create(
        **asked(body={"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        metadata={"user_id": "u"},
        inference_geo="eu",
    )

    assert "inference_geo" in raw.headers["X-KV-Warnings"]
    assert "thinking" in raw.headers["X-KV-Warnings"]
    assert "metadata" not in raw.headers["X-KV-Warnings"]
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    assert "tokens=" in raw.headers["x-kv-cache"]
    assert raw.parse().type == "message"


def test_the_cache_is_explained_to_who_asks(client: Anthropic) -> None:
    """The object of this server is beside the protocol's own fields, in a stream too."""
    ends = {"explain": True, "session": "s1", "ttl": "10m"}
    request = asked(system=f"Nobody else asks this. {SYSTEM}", body={"kv_cache": ends})

    message = client.messages.create(**request)
    last = list(client.messages.create(**request, stream=True))[-2]

    for found in (message, last):
        assert found.model_extra is not None
        assert found.model_extra["kv_cache"]["session"] == "s1"
        assert found.model_extra["kv_cache"]["expires_at"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "claude-x"}, anthropic.NotFoundError, "claude-x"),
        ({"max_tokens": -1}, anthropic.BadRequestError, "max_tokens"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "temperature"),
        ({"tools": [{"name": "f", "input_schema": {}}]}, anthropic.BadRequestError, "template"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "image",
        ),
        ({"cache_control": {"type": "ephemeral", "ttl": "x"}}, anthropic.BadRequestError, "ttl"),
    ],
)
def test_a_wrong_request_is_an_error_of_the_protocol(
    client: Anthropic, change: dict[str, Any], error: type[anthropic.APIStatusError], says: str
) -> None:
    """Status, shape and kind are those the SDK turns into its errors; the message says what to change."""
    with pytest.raises(error, match=says) as caught:
        client.messages.create(**asked() | change)

    body = caught.value.body
    assert isinstance(body, dict)
    assert body["type"] == "error"
    assert body["error"]["type"] in {"invalid_request_error", "not_found_error"}


def test_a_client_without_the_key_is_refused(strict: RunningServer) -> None:
    """On both routes; the SDK sends its key as x-api-key."""
    prompt: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    with Anthropic(base_url=strict.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**prompt, max_tokens=1)
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.count_tokens(**prompt)

    with Anthropic(base_url=strict.url, api_key=KEY, max_retries=0) as client:
        assert client.messages.count_tokens(**prompt).input_tokens > 0


def test_an_error_in_a_stream_is_told(strict: RunningServer) -> None:
    """Pings come while nothing else does; the end of the time is an event the SDK raises."""
    request = asked(body={"ignore_eos": True}) | {"max_tokens": 4000}
    with (
        Anthropic(base_url=strict.url, api_key=KEY, max_retries=0) as client,
        pytest.raises(anthropic.APIStatusError, match="request_timeout_s"),
    ):
        list(client.messages.create(**request, stream=True))


def test_a_long_silence_is_filled() -> None:
    """By comments until the first event, which comes when a long prompt is computed, and then by pings."""
    body = asked(system="A long prompt takes its time. " * 300) | {"stream": True}
    del body["extra_body"]
    with running_server(keep_alive_s=0.001) as restless, restless.client() as client:
        events = client.post("/v1/messages", json=body).text

    silence, _, told = events.partition("event: message_start\n")
    assert silence
    assert silence.replace(": keep-alive\n\n", "") == ""
    assert ": keep-alive" not in told
    assert 'event: ping\ndata: {"type": "ping"}\n\n' in told


def test_leaving_a_stream_ends_the_request(server: RunningServer, client: Anthropic) -> None:
    """The engine stops within a step, and works for others."""
    request = asked(body={"ignore_eos": True}) | {"max_tokens": 4000}
    stream = client.messages.create(**request, stream=True)
    next(iter(stream))
    num_before = server.service.engine.num_open
    stream.close()
    wait_until(lambda: server.service.engine.num_open == 0, "the request has ended")

    assert num_before == 1
    assert client.messages.create(**asked()).usage.output_tokens > 0
