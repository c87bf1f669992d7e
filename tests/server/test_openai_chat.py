"""Chats over real HTTP with the official client: answers, streams, counts, errors."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.openai_calls import (
    QUESTION,
    ask,
    cached_tokens,
    events_of,
    text_of,
    usage_of,
)
from tests.running_server import RunningServer


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """The official client, which does not try again: a test wants the first answer."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-key", max_retries=0) as found:
        yield found


def test_an_answer_has_the_fields_of_the_protocol(client: openai.OpenAI) -> None:
    """Text, reason, ids, and counts that add up."""
    answer = ask(client)

    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.system_fingerprint is not None
    assert answer.choices[0].message.role == "assistant"
    assert text_of(answer)
    assert answer.choices[0].finish_reason in {"stop", "length"}
    usage = usage_of(answer)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12


def test_the_second_time_the_prompt_is_cached_and_the_answer_the_same(
    client: openai.OpenAI,
) -> None:
    """Counts of the cache are there from the first request on, and say 0 as 0."""
    extra = {"kv_cache": {"salt": "second-time"}}

    cold, warm = (ask(client, extra_body=extra) for _ in range(2))

    assert text_of(warm) == text_of(cold)
    first, second = (usage_of(answer).prompt_tokens_details for answer in (cold, warm))
    assert first is not None
    assert second is not None
    assert first.cached_tokens == 0
    assert first.cache_write_tokens == usage_of(cold).prompt_tokens // 32 * 32
    assert second.cached_tokens == first.cache_write_tokens
    assert second.cache_write_tokens == 0


def test_headers_tell_of_the_cache_and_the_request(client: openai.OpenAI) -> None:
    """The raw response has the client's id, the cache's verdict, and timings."""
    for expected in ("MISS", "HIT"):
        raw = client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=2,
            extra_headers={"x-request-id": "my-own-id"},
            extra_body={"cache_salt": "headers"},
        )

        assert raw.headers["x-request-id"] == "my-own-id"
        assert raw.headers["x-kv-cache"].startswith(f"{expected}; tokens=")
        assert "first_token;dur=" in raw.headers["server-timing"]
        assert "x-kv-warnings" not in raw.headers


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    """Role first, then text, then the reason alone; no chunk of counts unless asked for."""
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=12, temperature=0, stream=True
        )
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(ask(client))
    assert chunks[-1].choices[0].finish_reason == ask(client).choices[0].finish_reason
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_counts_come_in_one_last_chunk_without_choices(server: RunningServer) -> None:
    """With include_usage every other chunk says null, and the last one has an empty list of choices."""
    with server.client() as plain:
        response = plain.post(
            "/v1/chat/completions",
            json={
                "messages": QUESTION,
                "max_tokens": 3,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )

    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = events_of(response)
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert set(events[-1]["usage"]["prompt_tokens_details"]) == {
        "cached_tokens",
        "cache_write_tokens",
    }


def test_running_counts_grow_with_every_chunk(server: RunningServer) -> None:
    """Load generators ask for counts all along."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    with server.client() as plain:
        response = plain.post(
            "/v1/chat/completions",
            json={
                "messages": QUESTION,
                "max_completion_tokens": 4,
                "ignore_eos": True,
                "stop": None,
                "stream": True,
                "stream_options": options,
            },
        )

    counts = [event["usage"]["completion_tokens"] for event in events_of(response)]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_several_outputs_are_told_apart(client: openai.OpenAI) -> None:
    """Outputs of one prompt, streamed or not, are the same with the same seed."""
    options: dict[str, Any] = {"n": 3, "temperature": 1.2, "seed": 7, "max_tokens": 8}

    whole = ask(client, **options)
    texts = ["", "", ""]
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, **options)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == texts
    assert len(set(texts)) > 1


def test_probabilities_belong_to_the_tokens_of_thetext_of(client: openai.OpenAI) -> None:
    """Tokens add up to the text, the chosen one of a greedy answer is the most likely one."""
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=6)

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    raw = b"".join(bytes(one.bytes or ()) for one in logprobs.content)
    assert raw.decode() == text_of(answer)
    for one in logprobs.content:
        assert one.logprob <= 0
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].token == one.token
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob


def test_streamed_probabilities_are_those_of_the_answer(client: openai.OpenAI) -> None:
    """None is lost where text lags behind its tokens."""
    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "max_tokens": 8}
    whole = ask(client, **options).choices[0].logprobs
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, stream=True, **options
    )
    found = [
        one
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for one in choice.logprobs.content or ()
    ]

    assert whole is not None
    assert [one.token for one in found] == [one.token for one in whole.content or ()]


def test_a_stop_text_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    """Cut at the third character of the greedy answer, which then is not part of it."""
    text = text_of(ask(client))
    stop = text[2:5]

    answer = ask(client, stop=[stop])

    assert text_of(answer) == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_bias_forces_and_forbids_tokens(client: openai.OpenAI) -> None:
    """+100 on one token makes it the answer; -100 on the first one makes it another."""
    found = ask(client, max_tokens=1, extra_body={"return_token_ids": True})
    first = found.choices[0].model_extra["token_ids"][0]  # type: ignore[index]
    other = 300 if first != 300 else 301

    forced = ask(
        client, max_tokens=3, logit_bias={str(other): 100}, extra_body={"return_token_ids": True}
    )
    without = ask(
        client, max_tokens=1, logit_bias={str(first): -100}, extra_body={"return_token_ids": True}
    )

    assert forced.choices[0].model_extra["token_ids"] == [other] * 3  # type: ignore[index]
    assert without.choices[0].model_extra["token_ids"] != [first]  # type: ignore[index]


def test_no_tokens_warm_the_cache(client: openai.OpenAI) -> None:
    """max_tokens 0 answers nothing, and the next request finds its prompt."""
    extra = {"kv_cache": {"salt": "warm-only"}}

    warm = ask(client, max_tokens=0, extra_body=extra)
    answer = ask(client, extra_body=extra)

    assert text_of(warm) == ""
    assert warm.choices[0].finish_reason == "length"
    assert usage_of(warm).completion_tokens == 0
    assert cached_tokens(answer) > 0


def test_without_a_limit_the_answer_ends_by_itself_or_with_the_context(
    client: openai.OpenAI,
) -> None:
    """No max_tokens: the engine takes all the room there is, and refuses nothing for it."""
    answer = ask(client, max_tokens=None)

    assert answer.choices[0].finish_reason in {"stop", "length"}


def test_content_in_parts_and_the_newer_role_are_understood(client: openai.OpenAI) -> None:
    """Parts of text are text, and a developer is a system: the same prompt, the same counts."""
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    parts = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]

    one, two = (ask(client, messages=messages) for messages in (plain, parts))

    assert text_of(one) == text_of(two)
    assert usage_of(one).prompt_tokens == usage_of(two).prompt_tokens


def test_explain_reports_and_warnings_warn(client: openai.OpenAI) -> None:
    """The object `kv_cache` comes back, at once and in a stream; unknown fields are in a header."""
    extra = {"kv_cache": {"session": "s-1", "explain": True, "sesion": 1}, "frobnicate": True}

    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=QUESTION, max_tokens=2, extra_body=extra
    )
    stream = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=2, extra_body=extra, stream=True
    )

    assert "did you mean session?" in raw.headers["x-kv-warnings"]
    assert "frobnicate" in raw.headers["x-kv-warnings"]
    report = raw.parse().model_extra["kv_cache"]  # type: ignore[index]
    assert report["session"] == "s-1"
    assert report["status"] in {"hit", "partial", "miss"}
    last = list(stream)[-1]
    assert last.choices == []
    assert last.model_extra["kv_cache"]["status"] == "hit"  # type: ignore[index]


def test_many_at_once_get_the_answers_of_each_alone(server: RunningServer) -> None:
    """Sixteen tasks of the asynchronous client, half of them streaming, one prompt each."""
    prompts = [f"Count from {number} on." for number in range(16)]

    async def ask(client: openai.AsyncOpenAI, prompt: str, *, is_stream: bool) -> str:
        messages: Any = [{"role": "user", "content": prompt}]
        options: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0}
        if not is_stream:
            answer = await client.chat.completions.create(messages=messages, **options)
            return answer.choices[0].message.content or ""
        stream = await client.chat.completions.create(messages=messages, stream=True, **options)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> tuple[list[str], list[str]]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0) as client:
            alone = [await ask(client, prompt, is_stream=False) for prompt in prompts]
            together = await asyncio.gather(
                *(ask(client, prompt, is_stream=n % 2 == 0) for n, prompt in enumerate(prompts))
            )
        return alone, list(together)

    alone, together = asyncio.run(ask_all())

    assert together == alone
