"""Quotas of tenants over real HTTP."""

from collections.abc import Iterator

import httpx
import pytest

from tests.running_server import RunningServer
from tests.server.test_cache_routes import error_of


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the module's server."""
    with server.client() as one:
        yield one


def test_a_quota_is_set_read_and_lifted(client: httpx.Client) -> None:
    """In bytes or as people write them."""
    set_ = client.put("/v1/cache/quotas/acme", json={"limit_bytes": "1MB"}).json()
    assert set_ == {
        "object": "cache.quota", "salt": "acme", "tier": None, "limit_bytes": 1_000_000,
        "used_bytes": 0,
    }  # fmt: skip
    assert client.get("/v1/cache/quotas/acme").json() == set_
    assert [one["salt"] for one in client.get("/v1/cache/quotas").json()["data"]] == ["acme"]
    much = error_of(client.put("/v1/cache/quotas/acme", json={"limit_bytes": "much"}), 400)
    assert much["message"].startswith("limit='much'")
    nothing = error_of(client.put("/v1/cache/quotas/acme", json={"limit_bytes": 0}), 400)
    assert nothing["param"] == "limit_bytes"

    assert client.delete("/v1/cache/quotas/acme").json()["deleted"] is True

    error_of(client.get("/v1/cache/quotas/acme"), 404)


def test_a_quota_may_be_on_one_tier(client: httpx.Client) -> None:
    """Beside one on all of them; a tier that is not there cannot have one."""
    path = "/v1/cache/quotas/acme"
    client.put(path, json={"limit_bytes": 9_000_000})
    set_ = client.put(path, json={"limit_bytes": "1MB", "tier": "device"}).json()

    assert (set_["tier"], set_["limit_bytes"]) == ("device", 1_000_000)
    assert client.get(path, params={"tier": "device"}).json() == set_
    assert client.get(path).json()["limit_bytes"] == 9_000_000
    listed = client.get("/v1/cache/quotas").json()["data"]
    assert [one["tier"] for one in listed] == [None, "device"]
    error = error_of(client.put(path, json={"limit_bytes": 1, "tier": "moon"}), 400)
    assert "tier='moon'" in error["message"]

    assert client.delete(path, params={"tier": "device"}).json()["deleted"] is True
    error_of(client.get(path, params={"tier": "device"}), 404)
    assert client.delete(path).json()["deleted"] is True
