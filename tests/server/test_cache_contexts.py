"""Named contexts and pins over HTTP: computed ahead, kept on purpose, capped, and let go."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.server.cache_contexts import ContextBook
from tests.running_server import RunningServer, running_server

LAW = "The tenant shall keep the garden, the roof and the lighthouse in good order. " * 6


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server with a small cache, so that pins come to their cap."""
    with running_server(llm_options={"capacity": "4MB"}) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the module's server, which has no contexts and an empty cache at first."""
    with server.client() as one:
        for context in one.get("/v1/cache/contexts").json()["data"]:
            one.delete(f"/v1/cache/contexts/{context['name']}").raise_for_status()
        one.post("/v1/cache/purge", json={"all": True, "include_pinned": True}).raise_for_status()
        yield one


def make(client: httpx.Client, name: str, **fields: Any) -> dict[str, Any]:
    """A context that was made."""
    answer = client.post("/v1/cache/contexts", json={"name": name, **fields})
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def known_tokens(client: httpx.Client, prompt: str) -> int:
    """How much of a prompt is cached."""
    answer = client.post("/v1/cache/lookup", json={"prompt": prompt})
    answer.raise_for_status()
    return int(answer.json()["known_tokens"])


def test_a_context_is_computed_once_and_found_by_requests(client: httpx.Client) -> None:
    """The receipt says what it cost; a request that begins so reuses it."""
    made = make(client, "law", prompt=LAW, ttl="1h", tags=["law"])

    assert made["receipt"]["computed_tokens"] == made["tokens"]
    assert made["known_tokens"] >= made["tokens"] // 32 * 32
    assert made["expires_at"] is not None
    again = make(client, "law", prompt=LAW, ttl="1h", tags=["law"])
    assert again["receipt"]["reused_tokens"] >= made["tokens"] // 32 * 32 - 32
    assert again["created_at"] == made["created_at"]
    body = {"model": "tiny", "prompt": LAW + "Who pays?", "max_tokens": 1}
    usage = client.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= made["tokens"] // 32 * 32


def test_a_context_of_messages_is_what_chat_sends(client: httpx.Client) -> None:
    """With tools, the template and all: a system text computed ahead is reused by a chat."""
    messages = [{"role": "system", "content": LAW}]
    made = make(client, "law", messages=messages, add_generation_prompt=False)

    body = {
        "model": "tiny",
        "messages": [*messages, {"role": "user", "content": "Who pays?"}],
        "max_tokens": 1,
    }
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]

    assert usage["prompt_tokens_details"]["cached_tokens"] >= made["tokens"] // 32 * 32


def test_contexts_are_listed_with_what_is_known_of_them_now(client: httpx.Client) -> None:
    """Names may hold slashes; after a purge the name stays, and nothing is known."""
    make(client, "law/v3", prompt=LAW)
    (listed,) = client.get("/v1/cache/contexts").json()["data"]
    assert listed["name"] == "law/v3"
    assert listed["known_tokens"] > 0

    client.post("/v1/cache/purge", json={"all": True}).raise_for_status()

    found = client.get("/v1/cache/contexts/law%2Fv3").json()
    assert found["known_tokens"] == 0
    assert found["tokens"] == listed["tokens"]


def test_a_deleted_context_takes_along_what_only_it_used(client: httpx.Client) -> None:
    """What another context begins with as well stays."""
    first, second = make(client, "one", prompt=LAW), make(client, "two", prompt=LAW + "More. " * 60)

    planned = client.delete("/v1/cache/contexts/two", params={"dry_run": True}).json()
    assert known_tokens(client, LAW + "More. " * 60) >= second["tokens"] // 32 * 32
    receipt = client.delete("/v1/cache/contexts/two").json()

    assert receipt == planned | {"dry_run": False}
    assert receipt["deleted"] == second["tokens"] // 32 - first["tokens"] // 32
    assert known_tokens(client, LAW) >= first["tokens"] // 32 * 32
    assert [one["name"] for one in client.get("/v1/cache/contexts").json()["data"]] == ["one"]
    assert client.delete("/v1/cache/contexts/one").json()["deleted"] == first["tokens"] // 32
    assert known_tokens(client, LAW) < 32


def test_a_pinned_context_survives_a_purge_until_it_is_unpinned(client: httpx.Client) -> None:
    """A purge says what it skipped; with include_pinned it skips nothing."""
    made = make(client, "law", prompt=LAW, pin=True)
    assert made["pinned"] is True
    num_blocks = made["tokens"] // 32

    kept = client.post("/v1/cache/purge", json={"all": True}).json()
    assert kept["skipped_pinned"] == num_blocks
    assert known_tokens(client, LAW) >= num_blocks * 32
    (pin,) = client.get("/v1/cache/pins").json()["data"]
    assert pin["blocks"] == num_blocks
    changed = client.patch("/v1/cache/contexts/law", json={"pinned": False}).json()

    assert changed["pinned"] is False
    assert client.get("/v1/cache/pins").json()["data"] == []
    assert client.post("/v1/cache/purge", json={"all": True}).json()["deleted"] == num_blocks


def test_a_change_of_a_context_adds_time_and_tags(client: httpx.Client) -> None:
    """What is left out stays; what was lost is computed again."""
    make(client, "law", prompt=LAW, tags=["a"])
    client.post("/v1/cache/purge", json={"all": True}).raise_for_status()

    changed = client.patch("/v1/cache/contexts/law", json={"tags": ["b"], "ttl": "7d"}).json()

    assert changed["tags"] == ["a", "b"]
    assert changed["ttl"] == "7d"
    assert changed["known_tokens"] >= changed["tokens"] // 32 * 32
    purged = client.post("/v1/cache/purge", json={"tags": ["b"]}).json()
    assert purged["deleted"] == changed["tokens"] // 32


def test_pins_of_prompts_contexts_and_sessions(client: httpx.Client) -> None:
    """Each is known by its name; several pins may mean the same blocks, which the last one lets go."""
    made = make(client, "law", prompt=LAW)
    body = {"model": "tiny", "prompt": LAW, "max_tokens": 1, "kv_cache": {"session": "s"}}
    client.post("/v1/completions", json=body).raise_for_status()
    for target in ({"context": "law"}, {"session": "s"}, {"name": "mine", "prompt": LAW}):
        answer = client.post("/v1/cache/pins", json=target)
        assert answer.status_code == 200, answer.text
        assert answer.json()["blocks"] >= made["tokens"] // 32
    names = {one["name"] for one in client.get("/v1/cache/pins").json()["data"]}
    assert names == {"law", "s", "mine"}

    for name in ("law", "s"):
        assert client.delete(f"/v1/cache/pins/{name}").json()["affected"] > 0
        skipped = client.post("/v1/cache/purge", json={"all": True}).json()["skipped_pinned"]
        assert skipped >= made["tokens"] // 32
    client.delete("/v1/cache/pins/mine").raise_for_status()

    assert client.post("/v1/cache/purge", json={"all": True}).json()["skipped_pinned"] == 0


def test_pins_beyond_the_cap_are_refused_with_the_numbers(client: httpx.Client) -> None:
    """413, and neither the cache nor the list of pins is any different."""
    long = " ".join(f"Paragraph {number} of the long law." for number in range(100))
    answer = client.post("/v1/cache/contexts", json={"name": "long", "prompt": long, "pin": True})

    assert answer.status_code == 413, answer.text
    assert any(letter.isdigit() for letter in answer.json()["error"]["message"])
    assert client.get("/v1/cache/pins").json()["data"] == []
    assert client.get("/v1/cache/contexts/long").status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/cache/contexts", {"prompt": "a"}),
        ("/v1/cache/contexts", {"name": "", "prompt": "a"}),
        ("/v1/cache/contexts", {"name": "a"}),
        ("/v1/cache/contexts", {"name": "a", "prompt": "a", "ttl": "soon"}),
        ("/v1/cache/contexts", {"name": "a", "prompt": "a", "tags": [""]}),
        ("/v1/cache/contexts", {"name": "a", "prompt": "a", "colour": "red"}),
        ("/v1/cache/pins", {}),
        ("/v1/cache/pins", {"prompt": "a"}),
        ("/v1/cache/pins", {"name": "a", "context": "b", "session": "c"}),
    ],
)
def test_what_cannot_be_is_refused(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Missing names, unreadable times, unknown fields, two targets."""
    answer = client.post(path, json=body)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_time_without_end_is_for_ever(tmp_path: Path) -> None:
    """As a number too, when it is made and when it is changed, and after a restart."""
    settings: dict[str, Any] = {"contexts_file": tmp_path / "contexts"}
    body = '{"name": "%s", "prompt": "Hello", "ttl": 1e999}'
    sent: dict[str, Any] = {"headers": {"content-type": "application/json"}}
    with running_server(**settings) as server, server.client() as client:
        answers = [client.post("/v1/cache/contexts", content=body % "law", **sent)]
        make(client, "rules", prompt="Hello", ttl="1h")
        answers.append(client.patch("/v1/cache/contexts/rules", content='{"ttl": 1e999}', **sent))
        for answer in answers:
            assert answer.is_success, answer.text
            assert (answer.json()["ttl"], answer.json()["expires_at"]) == ("never", None)
    with running_server(**settings) as server, server.client() as client:
        rows = client.get("/v1/cache/contexts").json()["data"]

    assert {row["name"]: row["ttl"] for row in rows} == {"law": "never", "rules": "never"}


def test_one_tenant_leaves_room_for_contexts_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of its own alone; what is renewed or deleted makes room as before."""
    small = partial(ContextBook, max_contexts=4)
    monkeypatch.setattr("kvkeep.server.cache_state.ContextBook", small)
    with (
        running_server(api_keys=("key-of-anna", "key-of-bert")) as server,
        server.client("key-of-anna") as anna,
        server.client("key-of-bert") as bert,
    ):
        for name in ("one", "two", "two"):
            make(anna, name, token_ids=[5], salt=name)
        body = {"name": "three", "token_ids": [5]}
        refused = anna.post("/v1/cache/contexts", json=body)
        make(bert, "one", token_ids=[5])
        anna.delete("/v1/cache/contexts/one", params={"salt": "one"}).raise_for_status()
        make(anna, "three", token_ids=[5])

    assert refused.status_code == 413
    message = "you have 2 contexts, at most 2; delete some first"
    assert refused.json()["error"]["message"] == message
