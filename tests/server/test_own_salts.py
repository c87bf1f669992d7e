"""What a tenant has under the salts of its clients is its own, whoever may name tenants."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server

ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
TEXT = "The treasure lies under the old oak behind the mill. " * 8
SALTS = (None, "x")


@pytest.fixture
def peers() -> Iterator[RunningServer]:
    """Two tenants, of whom each is its own administrator."""
    with running_server(api_keys=(ANNA, BERT)) as running:
        yield running


def complete(client: httpx.Client, **fields: Any) -> None:
    """A request that leaves its prompt in the cache."""
    body = {"prompt": TEXT, "max_tokens": 1, **fields}
    client.post("/v1/completions", json=body).raise_for_status()


def known(client: httpx.Client) -> list[bool]:
    """Under which of the salts the prompt is known."""
    asked = [{"prompt": TEXT, "salt": salt} for salt in SALTS]
    answers = [client.post("/v1/cache/lookup", json=one).raise_for_status() for one in asked]
    return [one.json()["known_tokens"] > 32 for one in answers]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/flush_cache", {}),
        ("/reset_prefix_cache", {}),
        ("/v1/cache/purge", {"all": True}),
        ("/v1/cache/purge", {"tags": ["doc"]}),
    ],
)
def test_what_a_peer_forgets_is_under_all_its_salts(
    peers: RunningServer, path: str, body: dict[str, Any]
) -> None:
    """And nothing of another's, who uses the same salt."""
    with peers.client(ANNA) as anna, peers.client(BERT) as bert:
        for salt in SALTS:
            for client in (anna, bert):
                complete(client, kv_cache={"salt": salt, "tags": ["doc"]})
        assert known(anna) == known(bert) == [True, True]

        anna.post(path, json=body).raise_for_status()

        assert known(anna) == [False, False]
        assert known(bert) == [True, True]


def test_a_purge_that_names_a_salt_means_that_alone(peers: RunningServer) -> None:
    """What the others have stays."""
    with peers.client(ANNA) as anna:
        for salt in SALTS:
            complete(anna, cache_salt=salt)

        anna.post("/v1/cache/purge", json={"salt": "x"}).raise_for_status()

        assert known(anna) == [True, False]


def test_a_peer_sees_what_it_has_under_all_its_salts(peers: RunningServer) -> None:
    """In counts and lists; no other tenant does."""
    with peers.client(ANNA) as anna, peers.client(BERT) as bert:
        complete(anna, session_id="plain")
        half = anna.get("/v1/cache").json()["tiers"]["device"]
        complete(anna, session_id="salted", cache_salt="x")
        complete(bert, session_id="of-bert", cache_salt="x")

        device = anna.get("/v1/cache").json()["tiers"]["device"]
        listed = anna.get("/v1/cache/entries", params={"limit": 1000}).json()["data"]
        sessions = anna.get("/v1/cache/sessions").json()["data"]

        assert device["entries"] == 2 * half["entries"] == len(listed)
        assert device["used_bytes"] == 2 * half["used_bytes"]
        assert {one["id"] for one in sessions} == {"plain", "salted"}
        assert not any("tenant" in one for one in (*listed, *sessions))


def test_beside_an_administrator_the_lists_of_a_tenant_are_as_whole() -> None:
    """Its sessions and contexts under all its salts, and nobody else's."""
    with (
        running_server(api_keys=(ANNA, BERT), admin_key=ADMIN) as server,
        server.client(ANNA) as anna,
        server.client(BERT) as bert,
    ):
        for client, name in ((anna, "of-anna"), (bert, "of-bert")):
            complete(client, session_id=name, cache_salt="x")
            body = {"name": name, "prompt": TEXT, "salt": "x"}
            client.post("/v1/cache/contexts", json=body).raise_for_status()

        for kind, field in (("sessions", "id"), ("contexts", "name")):
            rows = anna.get(f"/v1/cache/{kind}").json()["data"]
            assert [row[field] for row in rows] == ["of-anna"]


def test_blocks_of_a_file_are_the_tenants_under_any_salt(tmp_path: Path) -> None:
    """A salt under which nothing was sent since the start, only imported."""
    settings: dict[str, Any] = {"api_keys": (ANNA, BERT), "secret_file": tmp_path / "secret"}
    with running_server(**settings) as server, server.client(ANNA) as anna:
        complete(anna, session_id="s", cache_salt="x")
        path, salted = "/v1/cache/sessions/s/export", {"salt": "x"}
        file = anna.post(path, params=salted).raise_for_status().content
    with running_server(**settings) as server, server.client(ANNA) as anna:
        anna.post("/v1/cache/import", params=salted, content=file).raise_for_status()
        assert known(anna) == [False, True]

        anna.post("/flush_cache").raise_for_status()

        assert known(anna) == [False, False]
