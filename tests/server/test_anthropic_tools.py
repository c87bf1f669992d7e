"""Tools and required forms over the Anthropic SDK, with a chat template that knows tools."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.running_server import running_server
from tests.tool_llm import tool_llm

pytest.importorskip("llguidance")

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK: Any = {
    "name": "get_time",
    "input_schema": {"type": "object", "properties": {}, "additionalProperties": False},
}
QUESTION = {"role": "user", "content": "What is the weather in Oslo?"}


@pytest.fixture(scope="module")
def client() -> Iterator[Anthropic]:
    """A client of a server whose template knows tools."""
    with (
        running_server(tool_llm()) as server,
        Anthropic(base_url=server.url, api_key="any", max_retries=0) as client,
    ):
        yield client


def asked(**more: Any) -> dict[str, Any]:
    """A request with a tool."""
    return {
        "model": "tiny",
        "max_tokens": 200,
        "extra_body": {"temperature": 0},
        "messages": [QUESTION],
        "tools": [WEATHER],
        **more,
    }


def test_a_required_call_is_a_block(client: Anthropic) -> None:
    """Name and arguments fit the tool, and the reason says that the client has to act."""
    message = client.messages.create(**asked(tool_choice={"type": "tool", "name": "get_weather"}))

    (block,) = message.content
    assert block.type == "tool_use"
    assert block.name == "get_weather"
    assert block.input["city"] in {"Rome", "Oslo"}
    assert block.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"


def test_a_streamed_call_adds_up_to_the_same(client: Anthropic) -> None:
    """The SDK puts the arguments together from the events."""
    request = asked(tool_choice={"type": "tool", "name": "get_weather"})
    whole = client.messages.create(**request)

    with client.messages.stream(**request) as stream:
        final = stream.get_final_message()

    assert final.content[0].type == "tool_use"
    assert whole.content[0].type == "tool_use"
    assert final.content[0].input == whole.content[0].input
    assert final.stop_reason == "tool_use"


def test_a_conversation_goes_on_with_the_result(client: Anthropic) -> None:
    """The call and its result are sent back as they came; what was cached of them is read."""
    first = client.messages.create(**asked(tool_choice={"type": "any"}))
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Rain. " * 30}
    turns = [
        QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]

    second = client.messages.create(**asked(messages=turns, max_tokens=8))

    assert second.usage.cache_read_input_tokens
    assert second.usage.cache_creation_input_tokens


def test_tools_are_part_of_the_counted_prompt(client: Anthropic) -> None:
    """What the template writes of them costs tokens."""
    prompt: dict[str, Any] = {"model": "tiny", "messages": [QUESTION]}
    plain = client.messages.count_tokens(**prompt)
    tools = client.messages.count_tokens(**prompt, tools=[WEATHER, CLOCK])

    assert tools.input_tokens > plain.input_tokens + 20


def test_no_call_is_read_into_the_text_when_none_may_be_made(client: Anthropic) -> None:
    """With tool_choice none the answer is text, whatever it looks like; the prompt stays the same."""
    message = client.messages.create(**asked(tool_choice={"type": "none"}, max_tokens=8))

    assert {block.type for block in message.content} <= {"text"}
    assert message.stop_reason != "tool_use"


def test_an_unknown_tool_cannot_be_required(client: Anthropic) -> None:
    """The message names it."""
    with pytest.raises(anthropic.BadRequestError, match="get_wether"):
        client.messages.create(**asked(tool_choice={"type": "tool", "name": "get_wether"}))


def test_an_answer_has_the_required_form(client: Anthropic) -> None:
    """With a schema the text is JSON of it."""
    schema = {
        "type": "object",
        "properties": {"animal": {"enum": ["cat", "dog"]}, "sleeps": {"type": "boolean"}},
        "required": ["animal", "sleeps"],
        "additionalProperties": False,
    }
    request = asked(output_config={"format": {"type": "json_schema", "schema": schema}})
    del request["tools"]

    message = client.messages.create(**request)

    assert message.content[0].type == "text"
    found = json.loads(message.content[0].text)
    assert found["animal"] in {"cat", "dog"}
    assert isinstance(found["sleeps"], bool)
