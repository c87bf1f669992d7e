"""Lifetimes, tags and sessions of cached prompts, over the Anthropic protocol and its SDK."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import Message

from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

BLOCK = 32


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Anthropic]:
    """The SDK's client."""
    with Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def text(words: str, **more: Any) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": words, **more}


def asked(system: str | list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A request without output."""
    messages = [{"role": "user", "content": "Well? And then? " * 4}]
    return {"model": "tiny", "max_tokens": 0, "messages": messages, "system": system, **more}


def read_tokens(client: Anthropic, system: list[dict[str, Any]], **body: Any) -> int:
    """How many tokens of a prompt are read, after which all of it is cached."""
    message: Message = client.messages.create(**asked(system, extra_body=body))
    assert message.usage.cache_read_input_tokens is not None
    return message.usage.cache_read_input_tokens


def test_a_tag_on_a_part_covers_what_follows_it(server: RunningServer, client: Anthropic) -> None:
    """Purging it leaves what was before the part, and takes the part and all behind it."""
    rules = text("Be kind to whoever asks. " * 20)
    document = text("The shop opens at nine. " * 20, kv_cache={"tags": ["doc:anthropic"]})
    prompt: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    num_before = client.messages.count_tokens(**prompt, system=rules["text"]).input_tokens
    read_tokens(client, [rules, document])
    full = read_tokens(client, [rules, document])

    with server.client() as plain:
        purged = plain.post("/v1/cache/purge", json={"tags": ["doc:anthropic"]})

    assert purged.status_code == 200
    assert purged.json()["deleted"] > 0
    left = read_tokens(client, [rules, document])
    assert left < full
    assert num_before - 2 * BLOCK < left <= num_before
    assert read_tokens(client, [rules, document]) == full


def test_a_lifetime_that_is_over_is_over(client: Anthropic) -> None:
    """What a mark kept for two seconds is computed again after it."""
    mark = {"type": "ephemeral", "ttl": "2s"}
    system = [text("This is true for two seconds only. " * 20, cache_control=mark)]
    read_tokens(client, system)
    within = read_tokens(client, system)

    time.sleep(2.1)

    assert within > 4 * BLOCK
    assert read_tokens(client, system) < BLOCK


def test_nothing_is_left_of_who_does_not_want_it(client: Anthropic) -> None:
    """With write off the prompt is computed and forgotten."""
    system = [text("Nobody shall remember this. " * 20)]

    read_tokens(client, system, kv_cache={"write": False})

    assert read_tokens(client, system) < BLOCK


def test_salts_do_not_share(client: Anthropic) -> None:
    """The same prompt under another salt reads nothing, under the same one everything."""
    system = [text("Two houses, both alike in dignity. " * 20)]
    read_tokens(client, system, cache_salt="one")

    assert read_tokens(client, system, cache_salt="two") == 0
    assert read_tokens(client, system, cache_salt="one") > 4 * BLOCK


def test_leaving_before_the_answer_ends_the_request(server: RunningServer) -> None:
    """Also when it would not have been streamed."""
    body = {
        "model": "tiny",
        "max_tokens": 4000,
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "Tell me everything."}],
    }
    with server.client() as plain, pytest.raises(httpx.ReadTimeout):
        plain.post("/v1/messages", json=body, timeout=0.5)

    wait_until(lambda: server.service.engine.num_open == 0, "the request has ended")


def test_the_clients_of_two_keys_do_not_share() -> None:
    """Keys are tenants: what one has cached the other computes."""
    keys = ("first-secret-key", "second-secret-key")
    system = [text("The same words from two tenants. " * 20)]
    with running_server(api_keys=keys) as server:
        with Anthropic(base_url=server.url, api_key=keys[0], max_retries=0) as first:
            read_tokens(first, system)
            again = read_tokens(first, system)
        with Anthropic(base_url=server.url, api_key=keys[1], max_retries=0) as second:
            other = read_tokens(second, system)

    assert again > 4 * BLOCK
    assert other == 0


def test_a_client_learns_why_its_prompt_was_not_read(client: Anthropic) -> None:
    """With the id of the message before: nothing while it is read, and a reason when it is not."""
    story = asked("Tell a story. " * 20)
    first = client.messages.create(**story, diagnostics={"previous_message_id": None})
    before: Any = {"previous_message_id": first.id}
    same = client.messages.create(**story, diagnostics=before)
    song = asked("Sing a song now. " * 20)
    with client.messages.stream(**song, diagnostics=before) as stream:
        started = next(event for event in stream if event.type == "message_start")
    other = client.messages.create(**asked("Draw a picture. " * 20), diagnostics=before)

    assert first.diagnostics is None
    assert same.diagnostics is None
    assert started.message.diagnostics is not None
    assert started.message.diagnostics.cache_miss_reason is None
    assert other.diagnostics is not None
    assert other.diagnostics.cache_miss_reason is not None
