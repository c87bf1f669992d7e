"""The OpenAI SDK's responses against a running server."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from kvkeep.config import SamplingParams
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until
from tests.tool_llm import tool_llm

INSTRUCTIONS = "You answer questions about cats and dogs. " * 12
QUESTION = "Which of them sleeps more?"
KEYS = ("first-secret-key", "second-secret-key")
MAX_TOKENS = 24
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def asked(question: str = QUESTION, **more: Any) -> dict[str, Any]:
    """A request that always has the same answer."""
    return {
        "model": "tiny",
        "max_output_tokens": MAX_TOKENS,
        "temperature": 0,
        "instructions": INSTRUCTIONS,
        "input": question,
        **more,
    }


@pytest.fixture(scope="module")
def answer() -> str:
    """What the model answers."""
    messages = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": QUESTION},
    ]
    with LLM("tiny", capacity="64MB") as llm:
        return llm.chat(messages, SamplingParams(max_tokens=MAX_TOKENS, temperature=0)).text


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    """The SDK's client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_an_answer_is_that_of_the_model(client: OpenAI, answer: str) -> None:
    """Text, ids and what is repeated of the request are where the SDK looks for them."""
    response = client.responses.create(**asked(metadata={"who": "me"}))

    assert response.output_text == answer
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.status in {"completed", "incomplete"}
    assert response.instructions == INSTRUCTIONS
    assert response.metadata == {"who": "me"}
    assert response.temperature == 0
    assert response.output[0].type == "message"
    assert response.output[0].role == "assistant"


def test_usage_counts_what_was_read_and_written(client: OpenAI) -> None:
    """The first request writes, the second reads it; the prompt's count includes both."""
    request = asked(instructions="Birds are not the subject here. " * 20)

    first, second = (client.responses.create(**request).usage for _ in range(2))

    assert first is not None
    assert second is not None
    assert first.input_tokens == second.input_tokens
    assert first.total_tokens == first.input_tokens + first.output_tokens
    assert first.input_tokens_details.cache_write_tokens
    # The second also reads the end of the prompt, which became a full block with the answer.
    assert (
        second.input_tokens_details.cached_tokens >= first.input_tokens_details.cache_write_tokens
    )
    assert second.input_tokens_details.cache_write_tokens == 0


def test_a_stream_adds_up_to_the_response(client: OpenAI, answer: str) -> None:
    """The SDK's own adding up gives what comes without a stream."""
    stop = answer[len(answer) // 2 :][:4]
    text = ""
    with client.responses.stream(**asked(extra_body={"stop": stop})) as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
        final = stream.get_final_response()

    assert text == final.output_text == answer[: answer.index(stop)]
    assert final.status == "completed"


def test_the_events_of_a_stream_are_in_order(client: OpenAI) -> None:
    """They are numbered, and what they say last is the whole response."""
    events = list(client.responses.create(**asked(), stream=True))

    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    start = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[:4] == start
    assert kinds[-4:-1] == end
    assert set(kinds[4:-4]) == {"output_text.delta"}
    last = events[-1]
    assert last.type in {"response.completed", "response.incomplete"}
    assert last.response.usage is not None


async def _async_answers(url: str) -> tuple[str, str]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        whole = (await client.responses.create(**asked())).output_text
        stream = await client.responses.create(**asked(), stream=True)
        streamed = "".join(
            [event.delta async for event in stream if event.type == "response.output_text.delta"]
        )
        return whole, streamed


def test_the_asynchronous_client_gets_the_same(server: RunningServer, answer: str) -> None:
    """At once and as a stream."""
    assert asyncio.run(_async_answers(server.url)) == (answer, answer)


def test_a_response_is_continued_by_its_id(client: OpenAI) -> None:
    """It is the same as sending the whole conversation, and reads what the first turn has cached."""
    instructions = "Every turn is built on those before it. " * 15
    first = client.responses.create(**asked(instructions=instructions))
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Why?"},
    ]

    second = client.responses.create(
        **asked("Why?", instructions=instructions, previous_response_id=first.id)
    )
    whole = client.responses.create(**asked(instructions=instructions) | {"input": turns})

    assert second.previous_response_id == first.id
    assert second.output_text == whole.output_text
    assert first.usage is not None
    assert second.usage is not None
    assert whole.usage is not None
    assert second.usage.input_tokens == whole.usage.input_tokens
    written = first.usage.input_tokens_details.cache_write_tokens
    assert second.usage.input_tokens_details.cached_tokens >= written > 0


def test_a_streamed_response_is_continued_too(client: OpenAI) -> None:
    """Its end is told only when it can be."""
    events = list(client.responses.create(**asked(), stream=True))
    last = events[-1]
    assert last.type in {"response.completed", "response.incomplete"}

    second = client.responses.create(**asked("Why?", previous_response_id=last.response.id))

    assert second.previous_response_id == last.response.id


def test_instructions_hold_for_one_response(client: OpenAI) -> None:
    """A continuation without instructions has none, as the protocol says."""
    first = client.responses.create(**asked())
    with_them = client.responses.create(**asked("Why?", previous_response_id=first.id))
    request = asked("Why?", previous_response_id=first.id)
    del request["instructions"]

    without = client.responses.create(**request)

    assert with_them.usage is not None
    assert without.usage is not None
    assert without.usage.input_tokens < with_them.usage.input_tokens - 50


def test_turns_of_one_conversation_share_a_session(client: OpenAI) -> None:
    """The first response names it, unless the client does."""
    explain = {"kv_cache": {"explain": True}}
    first = client.responses.create(**asked(extra_body=explain))
    second = client.responses.create(
        **asked("Why?", previous_response_id=first.id, extra_body=explain)
    )
    named = client.responses.create(
        **asked(extra_body={"kv_cache": {"explain": True, "session": "mine"}})
    )

    sessions = [
        (response.model_extra or {})["kv_cache"]["session"] for response in (first, second, named)
    ]
    assert sessions == [first.id, first.id, "mine"]


def test_what_is_not_stored_cannot_be_continued(client: OpenAI) -> None:
    """With store false nothing is remembered of it."""
    first = client.responses.create(**asked(store=False))

    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked("Why?", previous_response_id=first.id))

    assert caught.value.code == "previous_response_not_found"
    assert caught.value.param == "previous_response_id"


def test_a_response_can_be_read_and_deleted(client: OpenAI) -> None:
    """It is found as it was given; afterwards it is gone."""
    first = client.responses.create(**asked())

    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)


def test_deleting_a_conversation_forgets_what_it_alone_has_cached(client: OpenAI) -> None:
    """Its blocks go with its last response; nobody else has used them."""
    request = asked(instructions="Nobody else has ever said this. " * 20)
    first = client.responses.create(**request)
    client.responses.delete(first.id)

    again = client.responses.create(**request)

    assert again.usage is not None
    # The first words of the template are everybody's.
    assert again.usage.input_tokens_details.cached_tokens < 16


def test_tokens_and_their_probabilities_are_told(client: OpenAI) -> None:
    """Their texts add up to the answer, in a stream as well."""
    request = asked(top_logprobs=2, include=["message.output_text.logprobs"])

    part = client.responses.create(**request).output[0].content[0]
    events = client.responses.create(**request, stream=True)
    deltas = [event for event in events if event.type == "response.output_text.delta"]

    assert part.type == "output_text"
    assert part.logprobs
    assert "".join(one.token for one in part.logprobs) == part.text
    assert all(len(one.top_logprobs) == 2 for one in part.logprobs)
    assert all(one.logprob <= 0 for one in part.logprobs)
    told = [one.token for delta in deltas for one in delta.logprobs]
    assert told == [one.token for one in part.logprobs]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": "", "instructions": None}, "input"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [WEATHER]}, "template"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(client: OpenAI, change: dict[str, Any], says: str) -> None:
    """Clearly, rather than ignored; the message names the field."""
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.responses.create(**asked() | change)

    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_is_not_found(client: OpenAI) -> None:
    """As on the other routes."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(**asked() | {"model": "gpt-x"})

    assert caught.value.code == "model_not_found"


def test_leaving_a_stream_ends_the_request(server: RunningServer, client: OpenAI) -> None:
    """The engine stops within a step, and works for others."""
    request = asked(max_output_tokens=4000, extra_body={"ignore_eos": True})
    stream = client.responses.create(**request, stream=True)
    next(iter(stream))
    num_before = server.service.engine.num_open
    stream.close()
    wait_until(lambda: server.service.engine.num_open == 0, "the request has ended")

    assert num_before == 1
    assert client.responses.create(**asked()).output_text


def test_tenants_do_not_find_each_other_s_responses() -> None:
    """An id that leaks is of no use to another key; and no key at all is refused."""
    with running_server(api_keys=KEYS) as server:
        url = f"{server.url}/v1"
        with (
            OpenAI(base_url=url, api_key=KEYS[0], max_retries=0) as owner,
            OpenAI(base_url=url, api_key=KEYS[1], max_retries=0) as other,
            OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        ):
            first = owner.responses.create(**asked())
            with pytest.raises(openai.NotFoundError):
                other.responses.retrieve(first.id)
            with pytest.raises(openai.NotFoundError):
                other.responses.delete(first.id)
            with pytest.raises(openai.BadRequestError):
                other.responses.create(**asked("Why?", previous_response_id=first.id))
            with pytest.raises(openai.AuthenticationError):
                stranger.responses.retrieve(first.id)
            assert owner.responses.retrieve(first.id).id == first.id


def test_the_end_of_the_time_fails_the_response() -> None:
    """A stream that has begun says so in its last event, and comments keep it alive until then."""
    with (
        running_server(request_timeout_s=1.0, keep_alive_s=0.005) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        request = asked(max_output_tokens=4000, extra_body={"ignore_eos": True})
        last = list(client.responses.create(**request, stream=True))[-1]
        body = asked(instructions="A long prompt. " * 300, stream=True)
        with server.client() as plain:
            events = plain.post("/v1/responses", json=body).text

    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "request_timeout_s" in last.response.error.message
    assert ": keep-alive\n\n" in events


def test_tools_are_called_and_answered() -> None:
    """A required call fits its tool, and its result continues the conversation, at once and in a stream."""
    pytest.importorskip("llguidance")
    with (
        running_server(tool_llm()) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        request = asked(
            tools=[WEATHER],
            tool_choice="required",
            parallel_tool_calls=False,
            max_output_tokens=200,
        )
        first = client.responses.create(**request)
        (call,) = first.output[-1:]
        with client.responses.stream(**request) as stream:
            streamed = stream.get_final_response().output[-1]
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
        second = client.responses.create(
            **asked(tools=[WEATHER], previous_response_id=first.id) | {"input": [result]}
        )

    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in {"Rome", "Oslo"}
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_an_answer_has_the_required_form(client: OpenAI) -> None:
    """With a schema the text is JSON of it."""
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}},
        "required": ["animal"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "name": "animal", "schema": schema, "strict": True}

    response = client.responses.create(**asked(text={"format": form}))

    assert json.loads(response.output_text)["animal"] in {"cat", "dog"}
