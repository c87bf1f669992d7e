"""Calls of tools are found in text that comes in any pieces, and nothing of the text is lost."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.errors import RequestError
from kvkeep.server.call_syntax import CallSyntax, HermesSyntax
from kvkeep.server.tool_calls import ToolCall, ToolCallParser, with_parsed_arguments
from tests.shown_calls import shown

_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
_OTHER = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


def _parsed(
    pieces: list[str], max_calls: int | None = None, syntax: CallSyntax | None = None
) -> list[str | ToolCall]:
    parser = ToolCallParser(syntax or HermesSyntax(), max_calls=max_calls)
    found = [part for piece in pieces for part in parser.feed(piece)]
    return found + parser.finish()


def test_text_and_calls_come_out_in_order() -> None:
    """Blanks around calls go, the text before them stays, arguments are JSON text."""
    parts = _parsed([f"Let me look.\n{_CALL}\n{_OTHER}\n"])

    assert shown(parts) == ["Let me look.", 'weather({"city": "Köln"})', "clock({})"]
    ids = [part.call_id for part in parts if isinstance(part, ToolCall)]
    assert len(set(ids)) == 2
    assert all(one.startswith("call_") for one in ids)


def test_text_leaves_as_soon_as_no_call_can_begin_in_it() -> None:
    """A stream is not held back: only blanks and what may be the begin of a mark wait."""
    parser = ToolCallParser(HermesSyntax())

    assert parser.feed("Hello ") == ["Hello"]
    assert parser.feed("world <to") == [" world"]
    assert parser.feed("ast>") == [" <toast>"]
    assert parser.finish() == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no json</tool_call>",
        "one \n <tool_call>no json</tool_call>\n\n<tool_call> ",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "weather", "argum',
        "a < b and <tool",
        "just text  \n",
        "",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    """Malformed and unfinished calls are given out as they were written."""
    assert "".join(shown(_parsed(list(text)))) == text


def test_a_call_whose_end_ended_the_output_is_a_call() -> None:
    """A stop text takes the closing mark away; the call is whole all the same."""
    (call,) = _parsed(['<tool_call>{"name": "clock", "arguments": {}}'])

    assert isinstance(call, ToolCall)


def test_behind_the_last_call_allowed_nothing_comes() -> None:
    """With one call allowed, the second and all text behind the first are dropped."""
    assert shown(_parsed([_CALL + _OTHER + "bye"], max_calls=1)) == ['weather({"city": "Köln"})']


@given(
    st.lists(
        st.sampled_from([_CALL, _OTHER, "text ", "\n", "<tool_call>", "</tool_call>", "<", "{}"]),
        max_size=8,
    ),
    st.data(),
)
def test_pieces_make_no_difference(parts: list[str], data: st.DataObject) -> None:
    """However the text is cut, the same text and the same calls come out."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(cuts)]

    found = _parsed(pieces)

    assert shown(found) == shown(_parsed([text]))
    if all(isinstance(part, str) for part in found):
        assert "".join(shown(found)) == text


def test_a_call_that_comes_back_is_an_object_for_the_template() -> None:
    """Arguments are parsed, so that the template writes what the model wrote; other text stays text."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    odd = {"id": "d", "type": "function", "function": {"name": "g", "arguments": "{oops"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call, odd]}

    found = with_parsed_arguments(message)

    assert found["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found["tool_calls"][1]["function"]["arguments"] == "{oops"
    assert json.loads(call["function"]["arguments"]) == {"a": 1}  # type: ignore[index]
    with pytest.raises(RequestError, match="names no function"):
        with_parsed_arguments({"tool_calls": [{"id": "c"}]})
