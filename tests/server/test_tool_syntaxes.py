"""Calls of tools as families of models write them: read from any pieces, forced, streamed, and sent back."""

import json
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.chat_completion import Choice

from kvkeep.llm import LLM
from kvkeep.server.call_syntax import (
    CallSyntax,
    HermesSyntax,
    LlamaSyntax,
    MistralSyntax,
    syntax_of,
)
from kvkeep.server.tool_calls import ToolCallParser
from tests.openai_calls import ask, cached_tokens, official_client, usage_of
from tests.running_server import RunningServer, running_server
from tests.shown_calls import shown
from tests.tool_templates import LLAMA, MISTRAL_ARGS, MISTRAL_LIST

_LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Köln", "in": [{}]}}'
_LLAMA_SHOWN = 'weather({"city": "Köln", "in": [{}]})'
_LISTED = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "clock"}]'
_NAMED = '[TOOL_CALLS]weather[ARGS]{"city": "Köln"}[TOOL_CALLS]clock[CALL_ID]abc123DEF[ARGS]{}'
_TWO = ['weather({"city": "Köln"})', "clock({})"]


def _shown(pieces: list[str], syntax: CallSyntax, max_calls: int | None = None) -> list[str]:
    """What is read of these pieces."""
    parser = ToolCallParser(syntax, max_calls=max_calls)
    return shown([*(part for piece in pieces for part in parser.feed(piece)), *parser.finish()])


@pytest.mark.parametrize(
    ("syntax", "text", "expected"),
    [
        (LlamaSyntax(), _LLAMA_CALL, [_LLAMA_SHOWN]),
        (LlamaSyntax(), f"\n<|python_tag|>{_LLAMA_CALL}\n", [_LLAMA_SHOWN]),
        (LlamaSyntax(), f"{_LLAMA_CALL}; {_LLAMA_CALL}\n;", [_LLAMA_SHOWN, _LLAMA_SHOWN]),
        (LlamaSyntax(), f"I look. <|python_tag|>{_LLAMA_CALL}", ["I look.", _LLAMA_SHOWN]),
        (LlamaSyntax(), f'{_LLAMA_CALL} {{"a": 1}}', [_LLAMA_SHOWN, ' {"a": 1}']),
        (MistralSyntax(), _LISTED, _TWO),
        (MistralSyntax(), f"Let me look.\n{_LISTED} ", ["Let me look.", *_TWO]),
        (MistralSyntax(), f'{_LISTED[:-1]}, {{"na', [*_TWO, ' {"na']),
        (MistralSyntax(has_args=True), _NAMED, _TWO),
        (MistralSyntax(), _NAMED, _TWO),
        (MistralSyntax(has_args=True), _LISTED, _TWO),
    ],
)
def test_calls_are_read_however_the_text_comes(
    syntax: CallSyntax, text: str, expected: list[str]
) -> None:
    """At once and letter by letter; with one call allowed nothing comes behind it."""
    assert _shown([text], syntax) == expected
    assert _shown(list(text), syntax) == expected
    calls = [one for one in expected if one in (*_TWO, _LLAMA_SHOWN)]
    before = expected[: expected.index(calls[0])]
    assert _shown(list(text), syntax, max_calls=1) == [*before, calls[0]]


@pytest.mark.parametrize(
    ("syntax", "text"),
    [
        (LlamaSyntax(), '{"answer": 3}'),
        (LlamaSyntax(), f'{{"answer": 3}} {_LLAMA_CALL}'),
        (LlamaSyntax(), '{"name": "Ann", "age": 3} is the one; {"name": "Bob"}'),
        (LlamaSyntax(), f"This is one: {_LLAMA_CALL}"),
        (LlamaSyntax(), '<|python_tag|>search.call(query="x")'),
        (LlamaSyntax(), '{"name": "weather", "parameters": {'),
        (LlamaSyntax(), " { \n"),
        (MistralSyntax(), "[TOOL_CALLS] nothing of the kind"),
        (MistralSyntax(), "[TOOL_CALLS]weather[ARGS]3 degrees"),
        (MistralSyntax(), '[TOOL_CALLS] [{"arguments": {}}] and [TOOL_CALLS]'),
        (MistralSyntax(), "[TOOL_CALLS] [1, 2]"),
        (MistralSyntax(), f"[TOOL_CALLS]{'x' * 400} and more"),
        (MistralSyntax(), f"[TOOL_CALLS] {'[' * 100_000}"),
    ],
)
def test_what_is_no_call_stays_text(syntax: CallSyntax, text: str) -> None:
    """JSON that was asked for, programs, and what has not ended are given out as they were written."""
    assert "".join(_shown([text], syntax)) == text
    if len(text) < 1000:
        assert "".join(_shown(list(text), syntax)) == text


def test_text_is_not_held_back_where_no_call_can_begin() -> None:
    """A stream flows on: bare calls begin an answer, others have marks."""
    llama, mistral = ToolCallParser(LlamaSyntax()), ToolCallParser(MistralSyntax())

    assert llama.feed("  It is {") == ["  It is {"]
    assert llama.feed('"a"} <|py') == ['"a"}']
    assert llama.feed("thon|>") == [" <|python|>"]
    assert mistral.feed("Well [TOOL") == ["Well"]
    assert mistral.feed("S] [TOOL_CALLS]" + "x" * 300) == [" [TOOLS]", " [TOOL_CALLS]" + "x" * 300]


@pytest.mark.parametrize("syntax", [LlamaSyntax(), MistralSyntax()])
@given(
    parts=st.lists(
        st.sampled_from(
            [
                _LLAMA_CALL,
                _LISTED,
                _NAMED,
                "text ",
                ";",
                "\n",
                "[TOOL_CALLS]",
                "<|python_tag|>",
                "{",
                "}",
            ]
        ),
        max_size=6,
    ),
    data=st.data(),
)
def test_pieces_make_no_difference(
    syntax: CallSyntax, parts: list[str], data: st.DataObject
) -> None:
    """However the text is cut, the same text and the same calls come out."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})

    found = _shown([text[start:end] for start, end in pairwise(cuts)], syntax)

    assert found == _shown([text], syntax)


def test_the_syntax_is_seen_in_the_template() -> None:
    """One that shows none is taken for one of Hermes, which most models know."""
    assert syntax_of(LLAMA) == LlamaSyntax()
    assert syntax_of(MISTRAL_LIST) == MistralSyntax()
    assert syntax_of(MISTRAL_ARGS) == MistralSyntax(has_args=True)
    for template in ('{"name": x, "parameters": y} in <tool_call>', "tools", None):
        assert syntax_of(template) == HermesSyntax()


# --- over HTTP ---------------------------------------------------------------------------------------

_WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Rome this week? " * 4}]
_TEMPLATES = {"llama": LLAMA, "mistral list": MISTRAL_LIST, "mistral args": MISTRAL_ARGS}


@pytest.fixture(scope="module", params=_TEMPLATES)
def tool_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The bundled model with a template; marks are special tokens, as they are with Mistral's models."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(str(files("kvkeep") / "bundled" / "tiny"), folder, dirs_exist_ok=True)
    _rename_tokens(folder, {"<|pad|>": "[TOOL_CALLS]", "<|bos|>": "[ARGS]"})
    llm = LLM(str(folder), capacity="64MB")
    assert llm.tokenizer is not None
    llm.tokenizer.chat_template = _TEMPLATES[request.param]
    assert len(llm.tokenizer.encode("[TOOL_CALLS]", add_special_tokens=False)) == 1
    with running_server(llm) as running:
        yield running


def _rename_tokens(folder: Path, names: dict[str, str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def client(tool_server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client."""
    pytest.importorskip("llguidance")
    with official_client(tool_server) as found:
        yield found


def _asked(client: openai.OpenAI, **options: Any) -> Choice:
    asked = {"messages": _ASKED, "tools": [_WEATHER], "tool_choice": "required", "max_tokens": 100}
    return ask(client, **asked | options).choices[0]


def test_a_forced_call_comes_back_and_is_found_in_the_cache(client: openai.OpenAI) -> None:
    """The template takes its id, and writes what the model wrote, so that the next turn reuses it."""
    options = {
        "messages": _ASKED,
        "tools": [_WEATHER],
        "tool_choice": "required",
        "max_tokens": 100,
    }
    first = ask(client, **options, parallel_tool_calls=False)
    message = first.choices[0].message
    assert message.tool_calls
    (call,) = message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in {"Rome", "Oslo"}
    assert message.content is None
    assert first.choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny " * 40}

    turns = [*_ASKED, message.model_dump(exclude_none=True), result]
    second = ask(client, messages=turns, tools=[_WEATHER], max_tokens=4)

    whole = usage_of(first).prompt_tokens + usage_of(first).completion_tokens
    assert cached_tokens(second) >= (whole - 2) // 32 * 32


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    """No piece of it comes as text."""
    message = _asked(client, parallel_tool_calls=False).message
    stream = client.chat.completions.create(
        model="tiny", messages=_ASKED, tools=[_WEATHER], tool_choice="required",
        parallel_tool_calls=False, temperature=0, max_tokens=100, stream=True,
    )  # fmt: skip
    chunks = list(stream)

    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert message.tool_calls
    assert [call.function.arguments for call in calls if call.function] == [
        call.function.arguments for call in message.tool_calls if call.type == "function"
    ]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_without_tools_marks_are_not_shown(client: openai.OpenAI) -> None:
    """Special tokens are no text, unless they are asked for."""
    bias: Any = {"logit_bias": {"0": 100}, "max_tokens": 2, "temperature": 0}

    hidden = ask(client, **bias).choices[0].message.content
    shown = (
        ask(client, **bias, extra_body={"skip_special_tokens": False}).choices[0].message.content
    )

    assert hidden == ""
    assert shown == "[TOOL_CALLS][TOOL_CALLS]"


def test_anthropic_clients_get_and_give_the_same_calls(
    tool_server: RunningServer, client: openai.OpenAI
) -> None:
    """The id is one that the template takes when it comes back."""
    assert client.base_url.host in tool_server.url
    tool: Any = {"name": "weather", "input_schema": _WEATHER["function"]["parameters"]}
    with anthropic.Anthropic(base_url=tool_server.url, api_key="unused", max_retries=0) as other:
        first = other.messages.create(
            model="tiny", max_tokens=100, messages=_ASKED, tools=[tool],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
        )  # fmt: skip
        (use,) = first.content
        assert use.type == "tool_use"
        assert re.fullmatch(r"[0-9a-f]{9}|toolu_[0-9a-f]+", use.id)
        result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
        answer: Any = {"role": "assistant", "content": [use.model_dump()]}
        turns = [*_ASKED, answer, {"role": "user", "content": [result]}]
        second = other.messages.create(model="tiny", max_tokens=3, messages=turns, tools=[tool])

    assert second.usage.output_tokens > 0
