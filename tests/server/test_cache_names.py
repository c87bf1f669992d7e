"""What names may be on the routes of the cache, and what bodies a lookup takes."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer
from tests.server.test_cache_routes import error_of

TEXT = "The lamplighter of the old harbour walks his round before the fog comes in. " * 6


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the module's server, whose cache is empty at the start of every test."""
    with server.client() as one:
        one.post("/v1/cache/purge", json={"all": True, "include_pinned": True}).raise_for_status()
        yield one


def complete(client: httpx.Client, **kv_cache: Any) -> dict[str, Any]:
    """What the answer to a request says of the cache, which it asks this of."""
    body = {"prompt": TEXT, "max_tokens": 1, "kv_cache": {"explain": True, **kv_cache}}
    answer = client.post("/v1/completions", json=body).raise_for_status()
    found: dict[str, Any] = answer.json()["kv_cache"]
    return found


def test_a_name_has_no_line_break(client: httpx.Client) -> None:
    """No path could name it."""
    body = {"name": "a\nb", "prompt": TEXT}

    error_of(client.post("/v1/cache/contexts", json=body), 400)

    assert client.get("/v1/cache/contexts").json()["data"] == []


@pytest.mark.parametrize("route", ["contexts", "pins"])
def test_the_longest_name_that_is_taken_can_be_used(client: httpx.Client, route: str) -> None:
    """A longer one is refused by its field; the server needs room for what it puts before it."""
    complete(client)
    body = {"name": "n" * 448, "prompt": TEXT}
    assert client.post(f"/v1/cache/{route}", json=body).status_code in (200, 201)
    assert client.delete(f"/v1/cache/{route}/{body['name']}").status_code == 200

    error = error_of(client.post(f"/v1/cache/{route}", json={**body, "name": "n" * 449}), 400)

    assert error["param"] == "name"


def test_sessions_that_are_called_as_those_of_contexts_are_listed(client: httpx.Client) -> None:
    """Only what stands for a context is left out."""
    body = {"name": "real", "prompt": TEXT}
    client.post("/v1/cache/contexts", json=body).raise_for_status()
    complete(client, session="context:zz")

    listed = [one["id"] for one in client.get("/v1/cache/sessions").json()["data"]]

    assert "context:zz" in listed
    assert "context:real" not in listed


def test_the_body_of_a_request_can_be_looked_up(client: httpx.Client) -> None:
    """Its sampling is not looked at; its salt and session are those of `kv_cache`, or of other names."""
    complete(client, salt="tenant", session="s")
    body = {"prompt": TEXT, "max_tokens": 5, "temperature": 0.0, "stream": True}

    other = client.post("/v1/cache/lookup", json=body).json()
    same = client.post("/v1/cache/lookup", json={**body, "kv_cache": {"salt": "tenant"}}).json()
    alias = client.post("/v1/cache/lookup", json={**body, "cache_salt": "tenant"}).json()

    assert other["known_tokens"] == 0
    assert same["known_tokens"] == alias["known_tokens"] > 32


def test_the_end_that_is_told_is_that_of_the_blocks(client: httpx.Client) -> None:
    """Who asked for less time than another does not end them sooner; a longer life is told as it is."""
    first = complete(client, ttl="1h")["expires_at"]
    again = complete(client, ttl="1m")["expires_at"]

    assert datetime.fromisoformat(again) >= datetime.fromisoformat(first)
    complete(client)
    assert complete(client, ttl="1m")["expires_at"] is None
