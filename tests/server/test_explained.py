"""Why a request missed, told with its answer: on every protocol, and to the same tenant only."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server

RULES = "Answer in one sentence and name the source of everything that you say. " * 6
OTHER_RULES = "Answer in two sentences " + RULES
QUESTION = {"role": "user", "content": "When does the harbour open, and who says so?"}
EXPLAIN = {"explain": True}


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the module's server, whose cache and history are those of a new start."""
    with server.client() as one:
        one.post("/v1/cache/purge", json={"all": True, "include_pinned": True}).raise_for_status()
        yield one


def chat(client: httpx.Client, system: str, **kv_cache: Any) -> dict[str, Any]:
    """What a chat's answer says of the cache."""
    body = {
        "model": "tiny",
        "messages": [{"role": "system", "content": system}, QUESTION],
        "max_tokens": 1,
        "kv_cache": EXPLAIN | kv_cache,
    }
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return dict(answer.json()["kv_cache"])


def test_a_chat_says_where_it_parted_from_what_is_cached(client: httpx.Client) -> None:
    """The system prompt was changed: its first token that differs, and both texts."""
    chat(client, RULES, salt="changed")
    found = chat(client, OTHER_RULES, salt="changed")
    again = chat(client, OTHER_RULES, salt="changed")

    assert found["miss"]["type"] == "system_changed"
    assert found["miss"]["message_index"] == 0
    assert "in one" in found["miss"]["cached_text"]
    assert "in two" in found["miss"]["sent_text"]
    assert again["status"] == "hit"
    assert again["miss"] is None


def test_a_chat_says_that_its_blocks_were_purged(client: httpx.Client) -> None:
    """A reason that only the cache knows, also when the request before did not ask."""
    client.post(
        "/v1/chat/completions",
        json={
            "model": "tiny",
            "messages": [{"role": "system", "content": RULES}, QUESTION],
            "max_tokens": 1,
            "kv_cache": {"tags": ["gone"]},
        },
    ).raise_for_status()
    client.post("/v1/cache/purge", json={"tags": ["gone"]}).raise_for_status()

    assert chat(client, RULES)["miss"]["type"] == "invalidated"


def test_other_protocols_say_it_too(client: httpx.Client) -> None:
    """Anthropic's messages and OpenAI's responses, behind a changed system prompt."""
    for system in (RULES, OTHER_RULES):
        message = client.post(
            "/v1/messages",
            json={
                "model": "tiny",
                "system": system,
                "messages": [QUESTION],
                "max_tokens": 1,
                "kv_cache": EXPLAIN | {"salt": "messages"},
            },
        ).json()
        response = client.post(
            "/v1/responses",
            json={
                "model": "tiny",
                "instructions": system,
                "input": QUESTION["content"],
                "max_output_tokens": 1,
                "kv_cache": EXPLAIN | {"salt": "responses"},
            },
        ).json()

    assert message["kv_cache"]["miss"]["type"] == "system_changed"
    assert response["kv_cache"]["miss"]["type"] == "system_changed"


def test_nobody_is_told_of_another_tenants_prompts() -> None:
    """The same prompts under another key: a first request, without a word of the others."""
    with (
        running_server(api_keys=("key-of-ada", "key-of-bob")) as server,
        server.client("key-of-ada") as ada,
        server.client("key-of-bob") as bob,
    ):
        chat(ada, RULES)
        assert chat(ada, OTHER_RULES)["miss"]["type"] == "system_changed"
        found = chat(bob, OTHER_RULES)

    assert found["status"] == "miss"
    assert found["miss"]["type"] == "first_request"
    assert "cached_text" not in found["miss"]


@pytest.mark.parametrize(
    ("before", "prompt", "status"),
    [
        (range(100, 1300), [100, *range(2000, 2100)], "miss"),  # it shares a token
        (range(100, 1300), [*range(100, 150), *range(2000, 2100)], "partial"),
        (range(100, 200), list(range(100, 200)), "hit"),
        (range(100, 164), list(range(100, 164)), "hit"),
        (range(100, 112), [*range(100, 103), *range(2000, 2009)], "miss"),
    ],
)
def test_all_that_tell_of_a_prompt_agree(
    client: httpx.Client, before: range, prompt: list[int], status: str
) -> None:
    """A lookup, the header and the report: by full blocks of the prompt; one without any is a miss."""
    salted = {"salt": f"agree-{before.stop}-{len(prompt)}-{prompt[-1]}"}
    sent = [
        ("/v1/completions", {"prompt": list(before), "max_tokens": 1, "kv_cache": salted}),
        ("/v1/cache/lookup", {"token_ids": prompt, "kv_cache": salted}),
        ("/v1/completions", {"prompt": prompt, "max_tokens": 1, "kv_cache": EXPLAIN | salted}),
    ]
    _, known, answer = (client.post(path, json=body).raise_for_status() for path, body in sent)
    found = answer.json()["kv_cache"]

    assert known.json()["status"] == found["status"] == status
    assert answer.headers["x-kv-cache"].startswith(f"{status.upper()}; tokens=")
    is_short = len(prompt) < 32
    assert ((found["miss"] or {}).get("type") == "too_short") is is_short
