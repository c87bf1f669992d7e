"""The prompt doctor names what breaks reuse, where it is, and what to do; it leaves sound prompts alone."""

import json
from typing import Any

import pytest

from kvkeep.cache.explain import Finding, Severity, lint_request
from kvkeep.cache.explain.lint_parts import PartKind, parts_of

RULES = "Answer in one sentence. Name the source of everything that you say. " * 12
PASSAGES = "The lighthouse was built of grey stone by the people of the village. " * 40


def chat(system: str, *messages: str, **fields: Any) -> dict[str, Any]:
    """A chat request: system text, then messages of user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": text} for at, text in enumerate(messages)]
    return {"messages": [{"role": "system", "content": system}, *turns], **fields}


def only(request: dict[str, Any], **options: Any) -> Finding:
    """The one finding."""
    (finding,) = lint_request(request, **options)
    return finding


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("The current time is 2026-11-22T14:19:39Z.", "a time: '2026-11-22T14:19:39Z'"),
        ("It is 14:19:39 now.", "a time: '14:19:39'"),
        ("Current time: 2:19 pm.", "a time: '2:19 pm'"),
        ("Today is 22 Nov 2026.", "a date: '22 Nov 2026'"),
        ("Today's date: November 22, 2026.", "a date: 'November 22, 2026'"),
        ("Today: 2026-11-22.", "a date: '2026-11-22'"),
        ("timestamp=1795357179", "a timestamp: '1795357179'"),
        ("The user wrote last 5 minutes ago.", "an age: '5 minutes ago'"),
        ("This is message 17 of 50.", "a counter: 'message 17 of 50'"),
        ("Turn #4.", "a counter: 'Turn #4'"),
        ("You have 12,431 tokens left.", "a counter: '12,431 tokens left'"),
        ("Token usage: 8123/200000.", "a counter: 'Token usage: 8123'"),
        (
            "Conversation 1b4e28ba-2fa1-11d2-883f-0016d3cca427.",
            "an id: '1b4e28ba-2fa1-11d2-883f-0016d3cca427'",
        ),
        ("request id 5f2c9a7b3d1e4f60.", "an id: '5f2c9a7b3d1e4f60'"),
        ("nonce: a8f3", "a random value: 'nonce: a8f3'"),
    ],
)
def test_what_changes_in_the_system_text_is_found(text: str, what: str) -> None:
    """Its place, its text, and that everything behind it is computed again."""
    found = only(chat(f"You help. {text} {RULES}", "Hello?"))

    assert found.what == what
    assert found.severity is Severity.BREAKS
    assert found.where.startswith("messages[0].content, character ")
    at = int(found.where.split()[-1])
    assert f"You help. {text}"[at:].startswith(what.split("'")[1])
    assert found.tokens_behind > len(RULES) // 4 - 8
    assert found.remedy


@pytest.mark.parametrize(
    "text",
    [
        "You are a friendly assistant.",
        "The library opened in 1921 and has 3:1 odds of flooding.",
        "Step 1: read. Step 2: answer. Use at most 3 tools.",
        "Open from 9:00 to 17:00. Phone 1612345678. Commit 5f2c9a7b3d1e4f60 is the first.",
        "Chapter 12 of the book tells of deadbeef and cafe.",
        "Call the tool get_weather with one city. Call 911 in need.",
        "Use at most 200 tokens.",
        "The sum of 1234567 and 7654321 is 8888888.",
    ],
)
def test_a_sound_prompt_has_no_findings(text: str) -> None:
    """Numbers and dates that belong to the text are left alone."""
    assert lint_request(chat(f"{text} {RULES}", "Hello?", "Hi!", f"And now? {text}")) == []


def test_a_date_without_a_word_for_now_is_only_doubtful() -> None:
    """It may be part of a fixed text: one request alone does not say."""
    found = only(chat(f"The library was opened on 1921-05-04. {RULES}", "Hello?"))

    assert found.severity is Severity.MAY_BREAK


def test_little_behind_a_date_is_found_all_the_same() -> None:
    """Less than a block is no hit in any case; what a conversation adds would be one."""
    found = only(chat("You help. Today is 2026-11-22.", "Hello?"))
    long = only(chat(f"You help. Today is 2026-11-22. {RULES}", "Hello?"))

    assert found.what == "a date: '2026-11-22'"
    assert found.severity is Severity.BREAKS
    assert found.tokens_behind < 32
    assert "less than a block (32 tokens by default), and a hit needs a whole one" in found.why
    assert "less than a block" not in long.why


def test_two_short_requests_tell_what_differs() -> None:
    """However few tokens it is now."""
    found = only(chat("Likes tea.", "a?"), earlier=chat("Likes rum.", "a?"))

    assert found.where == "messages[0].content, character 6"
    assert "less than a block" in found.why


def test_what_is_at_the_end_costs_nothing() -> None:
    """The newest message may hold any time or id: nothing stands behind it."""
    request = chat(RULES, "Hello?", "Hi!", "It is 2026-11-22 14:19. request id 5f2c9a7b3d1e4f60.")

    assert lint_request(request) == []


def test_times_of_past_messages_stay_but_ages_and_counters_do_not() -> None:
    """What was written into a message once is sent again as it is; an age is written anew."""
    dated = chat(RULES, "[2026-11-22 14:19:39] Hello?", "Hi!", "More? " + RULES)
    aged = chat(RULES, "(5 minutes ago) Hello?", "Hi!", "More? " + RULES)

    assert lint_request(dated) == []
    assert only(aged).what == "an age: '5 minutes ago'"
    assert only(aged).where.startswith("messages[1].content")


def test_a_time_before_long_passages_of_one_message_is_doubtful() -> None:
    """Passages behind it are found again only where the time is the same."""
    found = only(chat("You help.", f"Now: 2026-11-22 14:19. {PASSAGES} Who built it?"))

    assert found.severity is Severity.MAY_BREAK
    assert found.tokens_behind > 500


@pytest.mark.parametrize("wrap", ["prompt", "input", "system", "instructions", "parts", "tools"])
def test_every_protocol_is_read(wrap: str) -> None:
    """Completions, responses, messages with content parts, and tools."""
    text = f"The current time is 2026-11-22T14:19:39Z. {RULES}{PASSAGES}"
    requests: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": text},
        "input": {"input": text},
        "system": {"system": [{"type": "text", "text": text}], "messages": []},
        "instructions": {"instructions": text, "input": "Hello?"},
        "parts": chat("You help."),
        "tools": {"tools": [{"type": "function", "function": {"description": text}}]},
    }
    requests["parts"]["messages"].append(
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": text}]}
    )

    assert only(requests[wrap]).what == "a time: '2026-11-22T14:19:39Z'"


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"messages": None, "tools": 3, "prompt": 7, "system": {}, "input": [1, None]},
        {"messages": [3, {"role": "user"}, {"content": [1, {"text": None}]}], "kv_cache": []},
        {"prompt": [1, 2, 3]},
    ],
)
def test_what_is_no_request_has_no_findings(request_: dict[str, Any]) -> None:
    """Whatever JSON it is, there is an answer and no error."""
    assert lint_request(request_) == []


def test_tokens_are_counted_by_the_tokenizer_that_is_given() -> None:
    """With one token a character the number behind the time is exact."""
    text = "It is 14:19:39. " + RULES

    found = only(chat(text, "Hello?"), count_tokens=len)

    assert found.tokens_behind == len(text) - len("It is 14:19:39") + len("Hello?")


def test_the_costliest_comes_first_and_many_of_a_kind_are_few() -> None:
    """Certain before doubtful, then by tokens; a log of times is reported three times."""
    log = "".join(f"14:19:{second} something happened. " for second in range(10, 40))

    found = lint_request(chat(f"Opened 1921-05-04. {log}{RULES}", "Hello?"))

    assert [one.severity for one in found] == [*[Severity.BREAKS] * 3, Severity.MAY_BREAK]
    tokens = [one.tokens_behind for one in found[:3]]
    assert tokens == sorted(tokens, reverse=True)


def tool(name: str, **function: Any) -> dict[str, Any]:
    """A tool as clients send it."""
    return {"type": "function", "function": {"name": name, "description": RULES, **function}}


def test_two_requests_tell_that_the_order_of_tools_changes() -> None:
    """The same tools in another order make every token behind the first one another one."""
    tools = [tool("read"), tool("write"), tool("list")]
    earlier, later = chat("Help.", "a?", tools=tools), chat("Help.", "b?", tools=tools[::-1])

    found = only(later, earlier=earlier)

    assert found.what == "the order of the tools changes"
    assert found.where == "tools[0], character 0"
    assert "sort the tools" in found.remedy


def test_two_requests_tell_that_the_order_of_keys_changes() -> None:
    """JSON of equal content is another text when its keys are."""
    one = {"type": "function", "function": {"name": "read", "description": RULES}}
    other = {"function": one["function"], "type": "function"}

    found = only(chat("", "b?", tools=[other]), earlier=chat("", "a?", tools=[one]))

    assert found.what == "the order of keys in JSON changes"


def test_two_requests_tell_what_differs_early_in_the_text() -> None:
    """The first difference of what should be the same, with the text of both."""
    earlier = chat(f"Memory: likes tea. {RULES}", "Hello?")
    later = chat(f"Memory: likes coffee. {RULES}", "Hello?", "Hi!", "More?")

    found = only(later, earlier=earlier)

    assert found.severity is Severity.BREAKS
    assert found.where == "messages[0].content, character 14"
    assert "'coffee." in found.why
    assert "'tea." in found.why


def test_two_requests_tell_that_listed_lines_change_places() -> None:
    """What comes out of a set is sorted before it is written down."""
    lines = [f"- note number {at}, which is a whole line" for at in range(12)]
    earlier, later = chat("\n".join(lines), "a?"), chat("\n".join(lines[::-1]), "b?")

    assert only(later, earlier=earlier).what == "the order of lines changes"


def test_a_conversation_that_goes_on_differs_in_nothing() -> None:
    """New messages behind the old ones are what a conversation is."""
    earlier = chat(RULES, "Hello?")

    assert lint_request(chat(RULES, "Hello?", "Hi!", "More?"), earlier=earlier) == []


def test_an_edited_past_is_told() -> None:
    """A past message that is another one loses all that follows it."""
    earlier = chat("Help.", "Hello? " + RULES, "Hi! " + RULES, "More?")
    later = chat("Help.", "Hallo? " + RULES, "Hi! " + RULES, "More?")

    assert only(later, earlier=earlier).where == "messages[1].content, character 1"


def test_templates_that_write_the_date_or_drop_thinking_are_named() -> None:
    """Both change what stands before messages that stay as they are."""
    dated = lint_request(chat(RULES, "a?"), template="{{ strftime_now('%d %b %Y') }}")
    template = "{{ content.split('</think>')[-1] }}"
    thinking = chat(RULES, "a?", "<think>hm</think> Hi!", "b?")

    assert [one.where for one in dated] == ["chat template"]
    assert [one.what for one in lint_request(thinking, template=template)] == [
        "an answer with its thinking"
    ]
    assert lint_request(chat(RULES, "a?", "Hi!", "b?"), template=template) == []


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"kv_cache": {"read": False}}, "kv_cache.read"),
        ({"kv_cache": {"write": False}}, "kv_cache.write"),
        ({"cache_prompt": False}, "cache_prompt"),
        ({"cache_salt": "1b4e28ba-2fa1-11d2-883f-0016d3cca427"}, "cache_salt"),
        ({"kv_cache": {"salt": "2026-11-22T14:19:39Z"}}, "kv_cache.salt"),
    ],
)
def test_a_cache_that_is_switched_off_is_named(fields: dict[str, Any], where: str) -> None:
    """Switches, and a salt that nobody else will have."""
    assert only(chat(RULES, "a?", **fields)).where == where


def test_a_salt_with_a_name_is_sound() -> None:
    """One for each tenant is what salts are for."""
    assert lint_request(chat(RULES, "a?", kv_cache={"salt": "acme"})) == []


def test_parts_come_in_the_order_of_the_prompt() -> None:
    """Tools, then system text, then messages; the last message is the newest."""
    request = {**chat("S", "u", "a", "v", tools=[tool("t")]), "system": "X"}

    parts = parts_of(request)

    assert [part.where for part in parts] == [
        "tools[0]", "system", *(f"messages[{at}].content" for at in range(4)),
    ]  # fmt: skip
    assert [part.kind for part in parts] == [PartKind.FIXED] * 3 + [PartKind.PAST] * 2 + [
        PartKind.NEWEST
    ]
    assert json.loads(parts[0].text) == tool("t")
