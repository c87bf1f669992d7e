"""The administrator sees whose everything is, and names tenants by their ids."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server

ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
TEXT = "The treasure lies under the old oak behind the mill. " * 8


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants and an administrator."""
    with running_server(api_keys=(ANNA, BERT), admin_key=ADMIN) as running:
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[httpx.Client]:
    """Who has the admin key."""
    with server.client(ADMIN) as client:
        yield client


def complete(server: RunningServer, key: str, prompt: str, **kv_cache: Any) -> httpx.Response:
    """The answer to a request of a tenant that asks this of the cache."""
    body = {"prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}
    with server.client(key) as client:
        return client.post("/v1/completions", json=body)


@pytest.fixture
def anna(server: RunningServer, admin: httpx.Client) -> str:
    """The id of a tenant who has blocks and a session, as the administrator finds it."""
    complete(server, ANNA, f"Of Anna. {TEXT}", session="anna-s").raise_for_status()
    complete(server, BERT, f"Of Bert. {TEXT}", session="bert-s").raise_for_status()
    sessions = admin.get("/v1/cache/sessions").json()["data"]
    (found,) = {one["tenant"] for one in sessions if one["id"] == "anna-s"}
    assert isinstance(found, str)
    assert ANNA not in found
    return found


def test_lists_tell_whose_everything_is(admin: httpx.Client, anna: str) -> None:
    """Blocks, groups of them and sessions, of two tenants; and a tenant's alone by its id."""
    for kind, asked in (("entries", {}), ("entries", {"by": "labels"}), ("sessions", {})):
        path = f"/v1/cache/{kind}"
        everybody = admin.get(path, params=asked).json()["data"]
        own = admin.get(path, params={**asked, "tenant": anna}).json()["data"]

        assert {one["tenant"] for one in own} == {anna}
        assert len({one["tenant"] for one in everybody}) >= 2
        assert len(own) == sum(one["tenant"] == anna for one in everybody)


def test_a_session_of_a_tenant_is_seen_and_closed(admin: httpx.Client, anna: str) -> None:
    """By the tenant's id; without it a session of that name would be the administrator's own."""
    path = "/v1/cache/sessions/anna-s"
    assert admin.get(path).status_code == 404
    assert admin.get(path, params={"tenant": anna}).json()["tenant"] == anna

    closed = admin.delete(path, params={"tenant": anna}).json()

    assert closed["deleted"] > 0
    assert admin.get(path, params={"tenant": anna}).status_code == 404


def test_a_tenant_that_is_not_there_is_404(admin: httpx.Client) -> None:
    """And a purge of it forgets nothing."""
    unknown = {"tenant": "nobody"}
    body = {"tenant": "nobody", "include_pinned": True}
    for answer in (
        admin.get("/v1/cache/entries", params=unknown),
        admin.delete("/v1/cache/sessions/s", params=unknown),
        admin.put("/v1/cache/quotas", params=unknown, json={"limit_bytes": 1}),
        admin.post("/v1/cache/purge", json=body),
    ):
        assert answer.status_code == 404, answer.text
        assert "nobody" in answer.json()["error"]["message"]


def test_a_quota_of_a_tenant_holds(server: RunningServer, admin: httpx.Client, anna: str) -> None:
    """What it has is counted and bounded; what others have is not."""
    whose = {"tenant": anna}
    set_ = admin.put("/v1/cache/quotas", params=whose, json={"limit_bytes": "1GB"}).json()
    assert set_["tenant"] == anna
    assert set_["salt"] is None
    assert set_["used_bytes"] > 0
    limit = set_["used_bytes"] // 2
    admin.put("/v1/cache/quotas", params=whose, json={"limit_bytes": limit}).raise_for_status()
    complete(server, ANNA, f"Once more. {TEXT}").raise_for_status()

    (row,) = admin.get("/v1/cache/quotas").json()["data"]

    assert row["limit_bytes"] == limit
    assert 0 <= row["used_bytes"] <= limit
    assert admin.delete("/v1/cache/quotas", params=whose).json()["deleted"] is True
    assert admin.get("/v1/cache/quotas").json()["data"] == []


def test_a_quota_of_nobody_is_refused(admin: httpx.Client) -> None:
    """Salts of tenants are derived: a limit on a key or a made-up salt would limit nothing."""
    answer = admin.put(f"/v1/cache/quotas/{ANNA}", json={"limit_bytes": 1})

    assert answer.status_code == 400
    assert "tenant=ID" in answer.json()["error"]["message"]


def test_pins_count_for_the_quota(server: RunningServer, admin: httpx.Client, anna: str) -> None:
    """Pinned blocks never go, so that a tenant's pins must fit into what it may have."""
    whose = {"tenant": anna}
    complete(server, ANNA, f"To be pinned. {TEXT}").raise_for_status()
    body = {"name": "big", "prompt": f"To be pinned. {TEXT}"}
    admin.post("/v1/cache/pins", params=whose, json=body).raise_for_status()
    (row,) = admin.get("/v1/cache/pins").json()["data"]
    assert (row["name"], row["tenant"], row["blocks"] > 0) == ("big", anna, True)
    admin.put("/v1/cache/quotas", params=whose, json={"limit_bytes": 1000}).raise_for_status()

    answer = admin.post("/v1/cache/pins", params=whose, json={**body, "name": "again"})

    admin.delete("/v1/cache/quotas", params=whose).raise_for_status()
    assert admin.delete("/v1/cache/pins/big", params=whose).status_code == 200
    assert answer.status_code == 413, answer.text
    assert "quota" in answer.json()["error"]["message"]


def test_a_tenant_is_erased_by_its_id(
    server: RunningServer, admin: httpx.Client, anna: str
) -> None:
    """With the salts of its clients, its contexts and pins; and nothing of others."""
    complete(server, ANNA, f"Salted. {TEXT}", salt="of-a-client").raise_for_status()
    with server.client(ANNA) as client:
        body = {"name": "c", "prompt": f"Context. {TEXT}"}
        client.post("/v1/cache/contexts", json=body).raise_for_status()
    (context,) = admin.get("/v1/cache/contexts").json()["data"]
    assert (context["name"], context["tenant"]) == ("c", anna)
    others = [one for one in admin.get("/v1/cache/entries").json()["data"] if one["tenant"] != anna]

    erased = admin.post("/v1/cache/purge", json={"tenant": anna, "include_pinned": True}).json()

    left = admin.get("/v1/cache/entries").json()["data"]
    assert erased["deleted"] > 0
    assert {one["id"] for one in left} == {one["id"] for one in others}
    assert None not in {one["tenant"] for one in left}
    assert admin.get("/v1/cache/contexts", params={"tenant": anna}).json()["data"] == []


def test_pins_are_the_administrators(server: RunningServer, admin: httpx.Client) -> None:
    """403 for a key without the right, as on contexts: one tenant would take all that may be pinned."""
    refused = complete(server, ANNA, TEXT, pin=True)
    assert (refused.status_code, refused.json()["error"]["param"]) == (403, "kv_cache.pin")
    assert admin.get("/v1/cache/pins").json()["data"] == []

    name = complete(server, ADMIN, TEXT, pin=True).raise_for_status().json()["kv_cache"]["pin"]

    assert admin.delete(f"/v1/cache/pins/{name}").status_code == 200


def test_counts_of_everybody_are_the_administrators(
    server: RunningServer, admin: httpx.Client
) -> None:
    """/metrics tells what all do."""
    with server.client(ANNA) as client:
        assert client.get("/metrics").status_code == 403
    assert admin.get("/metrics").status_code == 200
