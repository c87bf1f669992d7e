"""Chats with the official OpenAI client, as tests send them."""

import json
from typing import Any

import httpx
import openai
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion

from tests.running_server import RunningServer

__all__ = [
    "QUESTION",
    "ask",
    "cached_tokens",
    "events_of",
    "official_client",
    "text_of",
    "usage_of",
]

_LONG = "The cache keeps what was computed once, and gives it back exactly. " * 20
# Some hundred tokens, of which most are the system's.
QUESTION: list[Any] = [
    {"role": "system", "content": _LONG},
    {"role": "user", "content": "What is a cache?"},
]


def official_client(server: RunningServer) -> openai.OpenAI:
    """One that does not try again: a test wants the first answer."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused-key", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    """The greedy answer to QUESTION, in 12 tokens, or as `options` say."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": 12,
        "temperature": 0,
    }
    found = client.chat.completions.create(**asked | options)
    assert isinstance(found, ChatCompletion)
    return found


def text_of(answer: ChatCompletion) -> str:
    """What the first output says."""
    return answer.choices[0].message.content or ""


def usage_of(answer: ChatCompletion) -> CompletionUsage:
    """The counts, which every answer has."""
    assert answer.usage is not None
    return answer.usage


def cached_tokens(answer: ChatCompletion) -> int:
    """How much of the prompt was cached."""
    details = usage_of(answer).prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    return details.cached_tokens


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a raw stream, which must end as the protocol says."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line[0] != ":"]
