"""Calls of tools over real HTTP, with a chat template that has them and grammars that force them."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion import Choice

from kvkeep.llm import LLM
from tests.openai_calls import ask, cached_tokens, official_client, text_of, usage_of
from tests.running_server import RunningServer, running_server

pytest.importorskip("llguidance")

# As Hermes and Qwen models have it: tools in the system message, calls and results as JSON in marks.
_TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\nTools:\\n' }}
{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{%- endfor %}{{ '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant\\n' }}
{%- if message.content %}{{ message.content }}{%- endif %}
{%- for call in message.tool_calls %}
{%- if not loop.first %}{{ '\\n' }}{%- endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}
""".strip()

_CITIES = {"enum": ["Rome", "Oslo"]}
_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"city": _CITIES},
        },
        "strict": True,
    },
}
_CLOCK = {"type": "function", "function": {"name": "clock"}}
_ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Rome this week?"}]


@pytest.fixture(scope="module")
def tool_server() -> Iterator[RunningServer]:
    """The bundled model with a template that shows tools."""
    llm = LLM("tiny", capacity="64MB")
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = _TEMPLATE
    with running_server(llm) as running:
        yield running


@pytest.fixture(scope="module")
def client(tool_server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    with official_client(tool_server) as found:
        yield found


def _call(client: openai.OpenAI, **options: Any) -> Choice:
    """The first output of an answer that must call `weather`."""
    asked = {
        "messages": _ASKED,
        "tools": [_WEATHER, _CLOCK],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "max_tokens": 200,
    }
    return ask(client, **asked | options).choices[0]


def test_a_forced_call_is_one_of_the_protocol(client: openai.OpenAI) -> None:
    """Name, an id, arguments as JSON text that match the parameters, and no content."""
    choice = _call(client)

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in _CITIES["enum"]


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    """Its delta has index, id, name and arguments; the reason comes last."""
    stream = client.chat.completions.create(
        model="tiny",
        messages=_ASKED,
        tools=[_WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=200,
        stream=True,
    )
    chunks = list(stream)

    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.index for call in calls] == [0]
    assert calls[0].function is not None
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments or "")["unit"] in {"C", "F"}
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_that_comes_back_is_found_in_the_cache(client: openai.OpenAI) -> None:
    """The template writes the call as the model wrote it, so that the next turn reuses prompt and call."""
    first = ask(
        client,
        messages=_ASKED,
        tools=[_WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    message = first.choices[0].message
    assert message.tool_calls
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny " * 40}

    turns = [*_ASKED, message.model_dump(exclude_none=True), result]
    second = ask(client, messages=turns, tools=[_WEATHER], max_tokens=4)

    whole = usage_of(first).prompt_tokens + usage_of(first).completion_tokens
    # The last token of the answer is never computed, nor is a block that it would fill.
    assert cached_tokens(second) >= (whole - 2) // 32 * 32
    assert cached_tokens(second) > usage_of(first).prompt_tokens // 32 * 32


def test_tools_may_stay_unused(client: openai.OpenAI) -> None:
    """With "auto" and "none" the model may say anything; the prompt is the same, and cached."""
    options: dict[str, Any] = {"messages": _ASKED, "tools": [_WEATHER], "max_tokens": 5}

    auto = ask(client, **options)
    none = ask(client, **options, tool_choice="none")

    assert text_of(auto) == text_of(none)
    assert usage_of(auto).prompt_tokens == usage_of(none).prompt_tokens
    assert cached_tokens(none) >= usage_of(auto).prompt_tokens // 32 * 32


def test_marks_on_tools_are_not_shown_to_the_model(client: openai.OpenAI) -> None:
    """What a client says of the cache, and `strict`, is not part of the prompt."""
    marked = {**_WEATHER, "cache_control": {"type": "ephemeral"}, "kv_cache": {"tags": ["t"]}}
    lax = {"type": "function", "function": {**_WEATHER["function"], "strict": False}}

    counts = [
        usage_of(ask(client, messages=_ASKED, tools=[tool], max_tokens=1)).prompt_tokens
        for tool in (_WEATHER, marked, lax)
    ]

    assert len(set(counts)) == 1


def test_a_form_and_tools_leave_the_model_the_choice(client: openai.OpenAI) -> None:
    """With a schema and tools the answer is JSON of the schema or a call, never anything else."""
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "nothing", "schema": schema}}

    for seed in range(4):
        choice = _call(client, tool_choice="auto", response_format=form, temperature=2.0, seed=seed)

        assert choice.message.content == "{}" or choice.message.tool_calls


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"tools": None}, "tools is empty"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "oracle"}}},
            "'oracle' is none of tools",
        ),
        ({"tools": [{"type": "web_search"}]}, "function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]}, "names no function"),
    ],
)
def test_calls_that_cannot_be_are_refused(
    client: openai.OpenAI, options: dict[str, Any], word: str
) -> None:
    """400 with the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        _call(client, **options)

    assert word in caught.value.message


def test_a_template_without_tools_is_not_given_any(server: RunningServer) -> None:
    """A model that cannot be told of tools is not asked to call them; "none" asks for nothing."""
    with official_client(server) as client:
        with pytest.raises(openai.BadRequestError, match="its chat template says nothing"):
            ask(client, tools=[_WEATHER])

        assert text_of(ask(client, tools=[_WEATHER], tool_choice="none")) == text_of(ask(client))
