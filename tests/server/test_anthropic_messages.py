"""What of an Anthropic request reaches the chat template, and what an answer becomes."""

from typing import Any

import pytest

from kvkeep.cache.explain import Miss, MissType
from kvkeep.engine import FinishReason, Piece
from kvkeep.errors import RequestError
from kvkeep.server.anthropic_prompt import (
    chat_messages,
    chat_tools,
    marked_blocks,
    template_options,
)
from kvkeep.server.anthropic_schemas import CountTokensRequest
from kvkeep.server.anthropic_stream import (
    MessageUsage,
    MessageWriter,
    StopSequences,
    diagnostics_of,
    stop_reason,
)
from kvkeep.spec import RequestId

CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}


def request(messages: list[dict[str, Any]], **fields: Any) -> CountTokensRequest:
    """A request with these messages."""
    return CountTokensRequest.model_validate({"model": "m", "messages": messages} | fields)


def converted(messages: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """The chat messages of a request."""
    return chat_messages(request(messages, **fields))


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": list(blocks)}


def text(words: str, **more: Any) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": words} | more


def piece(words: str, reason: FinishReason | None = None) -> Piece:
    """A piece of an answer."""
    return Piece(
        request_id=RequestId(1), choice=0, token_ids=(1,), text=words, finish_reason=reason
    )


def test_text_and_one_block_of_text_are_the_same_prompt() -> None:
    """Both ways of writing a turn, and of writing the system prompt, say the same."""
    plain = converted([{"role": "user", "content": "Hi"}], system="Be brief.")
    blocks = converted([user(text("Hi"))], system=[text("Be brief.")])

    assert plain == blocks
    assert plain == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


def test_marks_of_the_cache_do_not_change_the_prompt() -> None:
    """A client that moves its breakpoint from turn to turn keeps its prefix."""
    mark = {"type": "ephemeral"}

    assert converted([user(text("Hi", cache_control=mark))]) == converted([user(text("Hi"))])


def test_neighbours_of_one_role_are_one_message() -> None:
    """Templates want roles to alternate, and the protocol joins neighbours."""
    found = converted(
        [
            {"role": "user", "content": "one"},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "three"},
        ]
    )

    assert [message["role"] for message in found] == ["user", "assistant"]
    assert [part["text"] for part in found[0]["content"]] == ["one", "two"]


def test_calls_and_results_become_messages_of_tools() -> None:
    """A result is a message of its own that names its tool; text around it stays in order."""
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [text("3")]}
    found = converted(
        [
            {"role": "user", "content": "1 and 2?"},
            {"role": "assistant", "content": [text("Let me see."), CALL]},
            user(result, text("Thanks.")),
        ]
    )

    assert found[1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {
                    "id": "toolu_1",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "name": "add", "content": "3"},
        {"role": "user", "content": "Thanks."},
    ]


def test_a_failed_tool_says_so() -> None:
    """What went wrong reaches the model, which sees text only."""
    failed = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": "disk full",
        "is_error": True,
    }
    found = converted([{"role": "assistant", "content": [CALL]}, user(failed)])

    assert found[-1]["content"] == "Error: disk full"


def test_thoughts_of_earlier_turns_are_left_out() -> None:
    """Blocks of thinking come back from clients; they are no part of the prompt."""
    thinking = {"type": "thinking", "thinking": "hm", "signature": ""}
    found = converted(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [thinking, text("b")]},
        ]
    )

    assert found[1] == {"role": "assistant", "content": "b"}


def test_a_document_of_plain_text_is_read() -> None:
    """Its title and its text are what a template can show."""
    source = {"type": "text", "media_type": "text/plain", "data": "All is well."}
    found = converted([user({"type": "document", "source": source, "title": "Report"})])

    assert found == [{"role": "user", "content": "Report\n\nAll is well."}]


def test_tags_of_a_turn_are_on_its_first_part() -> None:
    """So they hold from there on, also when the turn was joined to its neighbour."""
    tagged = {"role": "user", "content": [text("b"), text("c")], "kv_cache": {"tags": ["doc:1"]}}
    own = text("d", kv_cache={"tags": ["doc:2"]})
    found = converted([{"role": "user", "content": "a"}, tagged, user(own)])

    tags = [part.get("kv_cache", {}).get("tags") for part in found[0]["content"]]
    assert tags == [None, ["doc:1"], None, ["doc:2"]]


def test_marks_are_found_everywhere() -> None:
    """On the system prompt, on turns and on tools."""
    mark = {"type": "ephemeral", "ttl": "1h"}
    found = request(
        [user(text("a", cache_control=mark))],
        system=[text("s", cache_control=mark)],
        tools=[{"name": "f", "input_schema": {}, "cache_control": mark}],
    )

    assert [block.get("cache_control") for block in marked_blocks(found)] == [mark] * 3


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"type": "image", "source": {"type": "url", "url": "x"}}, "image"),
        ({"type": "text"}, "text=None"),
        ({"type": "text", "text": {"deep": []}}, r"text=\{'deep': \[\]\}"),
        ({"type": "tool_result", "content": "x"}, "tool_use_id"),
        ({"type": "tool_result", "tool_use_id": "x", "content": 5}, "content=5"),
        ({"type": "tool_result", "tool_use_id": "x", "content": "3"}, "tool_use_id='x'.*no call"),
        ({"type": "server_tool_use"}, "server_tool_use"),
    ],
)
def test_a_block_that_cannot_be_read_is_refused_by_place(block: dict[str, Any], names: str) -> None:
    """The message says which block, and what is wrong with it."""
    with pytest.raises(RequestError, match=names):
        converted([user(text("a"), block)])


def test_tools_of_a_server_are_refused() -> None:
    """A search engine cannot be promised."""
    found = request([user(text("a"))], tools=[{"type": "web_search_20250305", "name": "web"}])

    with pytest.raises(RequestError, match=r"tools\.0\.type='web_search_20250305'"):
        chat_tools(found.tools)


@pytest.mark.parametrize(
    ("thinking", "options"),
    [
        (None, {}),
        ({"type": "enabled", "budget_tokens": 2048}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
    ],
)
def test_the_template_is_told_whether_to_think(
    thinking: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    """Templates of models that can think have a switch."""
    assert template_options(request([user(text("a"))], thinking=thinking)) == options


def test_the_stop_sequence_is_cut_and_remembered() -> None:
    """The longest of those that end the text is the one the engine stopped at."""
    stops = StopSequences(["!", "?!", "never"])

    assert stops.cut(piece("so?!")) == "so?!"
    assert stops.found is None
    assert stops.cut(piece(" end?!", FinishReason.STOP)) == " end"
    assert stops.found == "?!"


def test_usage_counts_every_token_once() -> None:
    """Input, read and written add up to the prompt; the lifetime says where writing counts."""
    usage = MessageUsage(
        prompt_tokens=100, read_tokens=64, written_tokens=32, output_tokens=5, ttl_s=300.0
    )

    assert usage.fields() == {
        "input_tokens": 4,
        "cache_read_input_tokens": 64,
        "cache_creation_input_tokens": 32,
        "cache_creation": {"ephemeral_5m_input_tokens": 32, "ephemeral_1h_input_tokens": 0},
        "output_tokens": 5,
        "service_tier": "standard",
    }


@pytest.mark.parametrize("ttl_s", [3600.0, None])
def test_what_is_kept_long_counts_as_written_for_the_hour(ttl_s: float | None) -> None:
    """An hour, or as long as the server keeps things."""
    creation = MessageUsage(prompt_tokens=64, written_tokens=64, ttl_s=ttl_s).fields()

    assert creation["cache_creation"]["ephemeral_1h_input_tokens"] == 64


def test_text_and_calls_become_blocks() -> None:
    """Events of a stream and the message that is sent at once say the same."""
    writer = MessageWriter("msg_1", "m")
    usage = MessageUsage(prompt_tokens=3)
    events = [
        *writer.start(usage),
        *writer.say("Let "),
        *writer.say(""),
        *writer.say("me."),
        *writer.call("toolu_1", "add", '{"a": 1}'),
        *writer.call("toolu_2", "add", "{}"),
        *writer.finish("tool_use", None, usage),
    ]

    assert [(event["type"], event.get("index")) for event in events] == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert writer.message()["content"] == [
        {"type": "text", "text": "Let me."},
        CALL,
        CALL | {"id": "toolu_2", "input": {}},
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["stop_reason"] is None


def test_a_call_without_an_object_stays_text() -> None:
    """The protocol has no place for it, and what a model says is not thrown away."""
    writer = MessageWriter("msg_1", "m")
    writer.call("toolu_1", "add", "[1]")
    writer.finish("end_turn", None, MessageUsage(prompt_tokens=3))

    assert writer.message()["content"] == [{"type": "text", "text": "add([1])"}]
    assert not writer.has_calls


@pytest.mark.parametrize(
    ("reason", "stopped_by", "has_calls", "is_out_of_context", "expected"),
    [
        (FinishReason.STOP, None, False, False, "end_turn"),
        (FinishReason.STOP, None, True, False, "tool_use"),
        (FinishReason.STOP, "\n", False, False, "stop_sequence"),
        (FinishReason.LENGTH, None, True, False, "max_tokens"),
        (FinishReason.LENGTH, None, False, True, "model_context_window_exceeded"),
    ],
)
def test_the_end_has_its_name(
    reason: FinishReason,
    stopped_by: str | None,
    has_calls: bool,
    is_out_of_context: bool,
    expected: str,
) -> None:
    """Why an answer ended, as clients of the protocol know it."""
    found = stop_reason(
        reason,
        stopped_by=stopped_by,
        has_calls=has_calls,
        is_out_of_context=is_out_of_context,
    )

    assert found == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MissType.SYSTEM_CHANGED, {"type": "system_changed", "cache_missed_input_tokens": 90}),
        (MissType.TOOLS_CHANGED, {"type": "tools_changed", "cache_missed_input_tokens": 90}),
        (MissType.FIRST_REQUEST, {"type": "previous_message_not_found"}),
        (MissType.EVICTED, {"type": "unavailable"}),
        (None, {"type": "unavailable"}),
    ],
)
def test_a_miss_has_the_protocol_s_name(kind: MissType | None, expected: dict[str, Any]) -> None:
    """Reasons that the protocol does not know are not passed off as others."""
    miss = None if kind is None else Miss(type=kind, missed_tokens=90)

    found = diagnostics_of(miss, num_computed=90, block_size=32)

    assert found == {"cache_miss_reason": expected}


def test_a_prompt_that_was_read_needs_no_reason() -> None:
    """The end of a prompt, less than a block, is always computed."""
    assert diagnostics_of(None, num_computed=32, block_size=32) is None
