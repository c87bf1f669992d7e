"""Items of a Responses request, the events of a response, and how long one can be continued."""

from dataclasses import replace
from typing import Any

import pytest

from kvkeep.errors import RequestError
from kvkeep.server.responses_history import KeptResponse, ResponseHistory
from kvkeep.server.responses_prompt import chat_tools, input_items, item_messages
from kvkeep.server.responses_stream import ResponseWriter

CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
USAGE = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def kept(response_id: str, words: str = "", session: str = "s") -> KeptResponse:
    """A response of one message."""
    return KeptResponse(
        response={"id": response_id},
        messages=[{"role": "user", "content": words}],
        session=session,
        salt=None,
        owns_session=True,
    )


def test_text_is_what_the_user_says() -> None:
    """The short way of writing an input."""
    assert item_messages(input_items("Hi")) == [{"role": "user", "content": "Hi"}]


def test_items_become_messages() -> None:
    """Messages of every role, calls with the answer they belong to, results with their tool's name."""
    found = item_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "1 and 2?"}]},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me see."}],
            },
            CALL,
            {"type": "reasoning", "summary": []},
            {"type": "function_call_output", "call_id": "c1", "output": "3"},
        ]
    )

    assert found == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 and 2?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "add", "arguments": {"a": 1}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "3", "name": "add"},
    ]


def test_a_result_finds_its_call_in_the_conversation_so_far() -> None:
    """The call was in an earlier response, its result comes with the next request."""
    before = item_messages([CALL])
    result = {"type": "function_call_output", "call_id": "c1", "output": "3"}

    assert item_messages([result], before)[0]["name"] == "add"


def test_tags_of_messages_and_parts_are_kept() -> None:
    """The readers of cache fields find them where a chat request would have them."""
    tags = {"tags": ["doc:1"]}
    part = {"type": "input_text", "text": "a", "kv_cache": tags}

    found = item_messages([{"role": "user", "content": [part], "kv_cache": tags}])

    assert found[0]["kv_cache"] == tags
    assert found[0]["content"][0]["kv_cache"] == tags


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ({"type": "item_reference", "id": "x"}, "item_reference"),
        ({"role": "nobody", "content": "a"}, "role='nobody'"),
        ({"role": "user"}, "content=None"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input_image"),
        ({"role": "user", "content": ["a"]}, "content.0='a'"),
        (CALL | {"arguments": "{"}, "arguments"),
        ({"type": "function_call_output", "output": "3"}, "call_id"),
        ({"type": "function_call_output", "output": "3", "call_id": "c9"}, "call_id='c9'.*no call"),
    ],
)
def test_an_item_that_cannot_be_read_is_refused_by_place(item: dict[str, Any], names: str) -> None:
    """The message says which item, and what is wrong with it."""
    with pytest.raises(RequestError, match=rf"input\.0.*{names}"):
        item_messages([item])


def test_tools_of_a_server_are_refused() -> None:
    """A search engine cannot be promised."""
    with pytest.raises(RequestError, match=r"tools\.0\.type='web_search'"):
        chat_tools([{"type": "web_search"}])


def test_a_response_is_told_in_order() -> None:
    """Events are numbered, every item is opened and closed, and the last one has the response."""
    writer = ResponseWriter({"id": "resp_1", "object": "response"}, "a")
    events = [
        *writer.start(),
        *writer.say("Let "),
        *writer.say("me."),
        *writer.call("c1", "add", '{"a": 1}'),
        *writer.finish(USAGE, completed_at=5.0),
    ]

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[-1]["response"] == writer.response()
    message, call = writer.response()["output"]
    assert message["content"][0]["text"] == "Let me."
    assert (call["arguments"], call["call_id"]) == ('{"a": 1}', "c1")
    assert message["id"] != call["id"]


def test_logprobs_go_out_with_the_text_of_their_tokens() -> None:
    """Tokens whose text is held back are told with the next text, once."""
    writer = ResponseWriter({"id": "resp_1"}, "a")
    first, second = {"token": "a"}, {"token": "b"}

    assert writer.say("", [first]) == []
    assert writer.say("ab", [second])[-1]["logprobs"] == [first, second]
    assert writer.say("c")[-1]["logprobs"] == []
    writer.finish(USAGE, completed_at=5.0)
    assert writer.response()["output"][0]["content"][0]["logprobs"] == [first, second]


def test_a_response_cut_short_says_why() -> None:
    """The text that came is there, and so is the reason."""
    writer = ResponseWriter({"id": "resp_1"}, "a")
    writer.say("Once")

    last = writer.finish(USAGE, completed_at=5.0, incomplete="max_output_tokens")[-1]

    assert last["type"] == "response.incomplete"
    assert writer.response()["incomplete_details"] == {"reason": "max_output_tokens"}
    assert writer.response()["output"][0]["status"] == "incomplete"


def test_a_failed_response_says_so() -> None:
    """A stream that has begun cannot take back its status of 200."""
    writer = ResponseWriter({"id": "resp_1"}, "a")
    writer.start()

    (last,) = writer.fail("the server failed")

    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "the server failed"}


def test_a_tenant_finds_its_own_responses_only() -> None:
    """An id of somebody else is as unknown as one that never was."""
    history = ResponseHistory()
    history.keep("a", kept("resp_1"))

    assert history.find("a", "resp_1") is not None
    assert history.find("b", "resp_1") is None
    assert history.find(None, "resp_1") is None
    assert history.drop("b", "resp_1") is None
    assert len(history) == 1


def test_responses_go_when_their_time_is_over() -> None:
    """One that has expired is not found, and its memory is given back with the next."""
    clock = Clock()
    history = ResponseHistory(ttl_s=10, clock=clock)
    history.keep(None, kept("resp_1"))

    clock.now_s += 9.9
    assert history.find(None, "resp_1") is not None
    clock.now_s += 0.1
    assert history.find(None, "resp_1") is None
    history.keep(None, kept("resp_2"))
    assert len(history) == 1


def test_the_oldest_go_when_room_is_needed() -> None:
    """What is kept never exceeds the bound, and the newest that fit are there."""
    one = ResponseHistory()
    one.keep(None, kept("resp_0", "x" * 100))
    history = ResponseHistory(max_bytes=3 * one.num_bytes)
    for number in range(10):
        history.keep(None, kept(f"resp_{number}", "x" * 100))

    assert history.num_bytes <= 3 * one.num_bytes
    assert [number for number in range(10) if history.find(None, f"resp_{number}")] == [7, 8, 9]


def test_a_response_larger_than_the_bound_is_not_kept() -> None:
    """It cannot be continued; the rest of the server goes on."""
    history = ResponseHistory(max_bytes=100)
    history.keep(None, kept("resp_1", "x" * 1000))

    assert len(history) == 0
    assert history.num_bytes == 0


def test_a_conversation_ends_with_its_last_response() -> None:
    """Only then may what it alone has cached be forgotten; it is told once."""
    history = ResponseHistory()
    history.keep(None, kept("resp_1"))
    history.keep(None, kept("resp_2"))

    history.drop(None, "resp_1")
    assert history.take_ended() == []
    history.drop(None, "resp_2")
    assert [one.session for one in history.take_ended()] == ["s"]
    assert history.take_ended() == []


def test_a_conversation_ends_when_its_time_is_over() -> None:
    """Sessions of what nobody continues do not pile up in the cache; those of clients are their own."""
    clock = Clock()
    history = ResponseHistory(ttl_s=10, clock=clock)
    history.keep(None, kept("resp_1", session="one"))
    history.keep(None, replace(kept("resp_2", session="mine"), owns_session=False))
    clock.now_s += 11
    history.keep(None, kept("resp_3", session="two"))

    assert [one.session for one in history.take_ended()] == ["one"]
