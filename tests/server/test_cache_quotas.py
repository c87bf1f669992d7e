"""Quotas of tenants over real HTTP."""

import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.running_server import RunningServer, running_server
from tests.server.test_cache_routes import error_of
from tests.servers import wait_until


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


def test_quotas_outlive_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are in force after a restart, those that were lifted are not, and one on a missing tier waits."""
    file = tmp_path / "quotas"
    with running_server(quotas_file=file, tiers=["host:64MB"]) as first, first.client() as client:
        for salt, limit, tier in (("a", "300KB", None), ("a", "1MB", "host"), ("b", "2MB", None)):
            body = {"limit_bytes": limit, "tier": tier}
            client.put(f"/v1/cache/quotas/{salt}", json=body).raise_for_status()
        client.delete("/v1/cache/quotas/b").raise_for_status()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    with running_server(quotas_file=file) as again, again.client() as client:
        wait_until(lambda: "not in force" in caplog.text, "the quotas are restored")
        assert quotas_of(client) == [("a", None, 300_000)]
        asked = {"prompt": list(range(200)), "max_tokens": 1, "kv_cache": {"salt": "a"}}
        client.post("/v1/completions", json=asked).raise_for_status()
        used = client.get("/v1/cache/quotas/a").json()["used_bytes"]
        assert 0 < used <= 300_000

    with running_server(quotas_file=file, tiers=["host:64MB"]) as last, last.client() as client:
        every = [("a", None, 300_000), ("a", "host", 1_000_000)]
        wait_until(lambda: quotas_of(client) == every, "the quotas are restored")


def quotas_of(client: httpx.Client) -> list[tuple[str, str | None, int]]:
    """The quotas that are in force."""
    listed = client.get("/v1/cache/quotas").json()["data"]
    return [(one["salt"], one["tier"], one["limit_bytes"]) for one in listed]
