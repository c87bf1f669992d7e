"""Who may use the server: keys, tenants, administrators, and what a web page may not do."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.config.server import ServerSettings
from kvkeep.errors import ConfigError
from kvkeep.server.auth import Gate, Tenant
from kvkeep.server.errors import ApiError
from kvkeep.server.server_secret import read_secret
from tests.running_server import RunningServer, running_server

_ALICE = "alice-has-this-key"
_BOB = "bob-has-another-one"
_ADMIN = "who-looks-after-it"
_SECRET = b"s" * 32
_PROMPT = "A story that only I know, told at length. " * 20


@pytest.fixture(scope="module")
def guarded() -> Iterator[RunningServer]:
    """A server with two keys and one for the administrator."""
    with running_server(api_keys=[_ALICE, _BOB], admin_key=_ADMIN) as running:
        yield running


@pytest.fixture(scope="module")
def document(guarded: RunningServer) -> Mapping[str, Any]:
    """The server's OpenAPI document, which is behind the gate as well."""
    with guarded.client(_ALICE) as client:
        found: Mapping[str, Any] = client.get("/openapi.json").json()
        return found


def test_no_route_answers_without_a_key(
    guarded: RunningServer, document: Mapping[str, Any]
) -> None:
    """Every route of the document, and those that are none, refuse; only /health does not."""
    asked = [
        (method, path.replace("{", "").replace("}", ""))
        for path, methods in document["paths"].items()
        for method in methods
        if path != "/health"
    ]
    asked += [("get", "/openapi.json"), ("get", "/nothing"), ("post", "/v1/nothing"), ("get", "/")]
    assert len(asked) > 8
    with guarded.client() as client:
        for method, path in asked:
            for headers in (
                {},
                {"authorization": "Bearer wrong-key-000"},
                {"x-api-key": _ALICE[:-1]},
            ):
                response = client.request(method.upper(), path, headers=headers)
                assert response.status_code == 401, (method, path, headers)
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {_ALICE}"},
        {"authorization": f"bearer   {_ALICE}"},
        {"x-api-key": _ALICE},
    ],
)
def test_a_key_is_taken_in_either_header(guarded: RunningServer, headers: dict[str, str]) -> None:
    """As OpenAI's clients send it, and as Anthropic's do."""
    response = httpx.get(f"{guarded.url}/v1/models", headers=headers)

    assert response.status_code == 200


def test_a_refusal_names_the_remedy_in_the_shape_of_the_protocol(guarded: RunningServer) -> None:
    """Both protocols have their own word for it."""
    with guarded.client("wrong-key-000") as client:
        one = client.get("/v1/models")
        other = client.post("/v1/messages", json={})

    assert one.json()["error"]["code"] == "invalid_api_key"
    assert "x-api-key" in one.json()["error"]["message"]
    assert "wrong-key" not in one.text
    assert one.headers["www-authenticate"] == "Bearer"
    assert other.json()["type"] == "error"
    assert other.json()["error"]["type"] == "authentication_error"
    assert other.headers["x-request-id"]


def cached_tokens(client: httpx.Client, **body: Any) -> int:
    """Of the prompt that was sent, what the cache had."""
    asked = {"prompt": _PROMPT, "max_tokens": 1, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_keys_do_not_share_blocks_whatever_salt_they_ask_for(guarded: RunningServer) -> None:
    """One key finds its own prompt again; another does not, not even by the other's salt."""
    gate = Gate(guarded.settings, _SECRET)
    salt_of_alice = gate.admit({"x-api-key": _ALICE}).salt
    with guarded.client(_ALICE) as alice, guarded.client(_BOB) as bob:
        assert cached_tokens(alice) == 0
        assert cached_tokens(alice) > 100
        assert cached_tokens(bob) == 0
        assert cached_tokens(bob, cache_salt=salt_of_alice) == 0
        assert cached_tokens(alice, cache_salt="mine") == 0
        assert cached_tokens(alice, cache_salt="mine") > 100
        assert cached_tokens(bob, cache_salt="mine") == 0


def test_salts_are_the_same_after_a_restart_and_tell_nothing() -> None:
    """They depend on the key and the server's secret alone."""
    settings = ServerSettings(api_keys=[_ALICE, _BOB])

    def salt(key: str, secret: bytes = _SECRET) -> str | None:
        return Gate(settings, secret).admit({"x-api-key": key}).salt

    assert salt(_ALICE) == salt(_ALICE)
    assert len({salt(_ALICE), salt(_BOB), salt(_ALICE, b"t" * 32)}) == 3
    assert _ALICE not in str(salt(_ALICE))


def test_tenants_mix_what_clients_ask_for_into_their_salt() -> None:
    """Never the plain text, which could be another tenant's salt; without keys it is taken as it is."""
    gate = Gate(ServerSettings(api_keys=[_ALICE, _BOB]), _SECRET)
    alice, bob = gate.admit({"x-api-key": _ALICE}), gate.admit({"x-api-key": _BOB})

    assert alice.salt_for(None) == alice.salt
    assert alice.salt_for("x") == alice.salt_for("x") != bob.salt_for("x")
    assert bob.salt_for(alice.salt) != alice.salt
    assert alice.salt_for("") not in (None, "", alice.salt)
    everybody = Gate(ServerSettings(), _SECRET).admit({})
    assert everybody.salt_for(None) is None
    assert everybody.salt_for("x") == "x"


def test_keys_of_one_owner_can_share() -> None:
    """Then they are different tenants in the log, and one in the cache."""
    gate = Gate(ServerSettings(api_keys=[_ALICE, _BOB], isolate_keys=False), _SECRET)
    alice, bob = gate.admit({"x-api-key": _ALICE}), gate.admit({"x-api-key": _BOB})

    assert alice.salt_for("x") == bob.salt_for("x")
    assert alice.tenant_id != bob.tenant_id


@pytest.mark.parametrize(
    ("settings", "key", "is_admin"),
    [
        ({}, None, True),
        ({"api_keys": [_ALICE]}, _ALICE, True),
        ({"api_keys": [_ALICE], "admin_key": _ADMIN}, _ALICE, False),
        ({"api_keys": [_ALICE], "admin_key": _ADMIN}, _ADMIN, True),
        ({"admin_key": _ADMIN}, None, False),
        ({"admin_key": _ADMIN}, _ADMIN, True),
    ],
)
def test_who_administers(settings: dict[str, Any], key: str | None, is_admin: bool) -> None:
    """The admin key if there is one, else whoever may use the server at all."""
    gate = Gate(ServerSettings(**settings), _SECRET)

    tenant = gate.admit({} if key is None else {"x-api-key": key})

    assert isinstance(tenant, Tenant)
    assert tenant.is_admin is is_admin


def test_odd_keys_are_wrong_and_do_no_harm() -> None:
    """Whatever bytes a client sends."""
    gate = Gate(ServerSettings(api_keys=[_ALICE]), _SECRET)

    for key in ("", " ", "\udcff\udcfe", "é", _ALICE.upper(), _ALICE + " x", "\x00"):
        with pytest.raises(ApiError) as refused:
            gate.admit({"x-api-key": key})
        assert refused.value.status == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])  # noqa: S104
def test_others_are_not_let_in_without_a_key(host: str) -> None:
    """An admin key alone does not help: everybody could still use the model."""
    with pytest.raises(ConfigError, match="api_keys is empty"):
        ServerSettings(host=host)
    with pytest.raises(ConfigError, match="api_keys is empty"):
        ServerSettings(host=host, admin_key=_ADMIN)

    ServerSettings(host=host, api_keys=[_ALICE])


def test_web_pages_may_not_use_a_server_without_keys(server: RunningServer) -> None:
    """Neither from their own origin nor by a name that leads to this machine."""
    with server.client() as client:
        from_page = client.get("/version", headers={"origin": "https://evil.example"})
        rebound = client.get("/version", headers={"host": f"evil.example:{server.port}"})
        own_page = client.get("/version", headers={"origin": server.url})
        by_name = client.get("/version", headers={"host": f"localhost:{server.port}"})

    assert from_page.status_code == rebound.status_code == 403
    assert own_page.status_code == by_name.status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_images_and_links_of_web_pages_reach_nothing(server: RunningServer, site: str) -> None:
    """Browsers send no Origin with them, but say that they are of another page."""
    with server.client() as client:
        image = client.get("/flush_cache", headers={"sec-fetch-site": site})
        typed = client.get("/version", headers={"sec-fetch-site": "none"})
        own = client.get("/version", headers={"sec-fetch-site": "same-origin"})
        health = client.get("/health", headers={"sec-fetch-site": site})

    assert image.status_code == 403
    assert "sec-fetch-site" in image.json()["error"]["message"]
    assert typed.status_code == own.status_code == health.status_code == 200


def test_allowed_origins_may_call() -> None:
    """The browser asks first, without a key, and reads our headers in the answer."""
    origin = "https://chat.example"
    preflight = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with (
        running_server(api_keys=[_ALICE], allowed_origins=[origin]) as running,
        running.client(_ALICE) as client,
    ):
        asked = httpx.options(f"{running.url}/v1/completions", headers=preflight)
        allowed = client.get("/v1/models", headers={"origin": origin})
        other = client.get("/v1/models", headers={"origin": "https://evil.example"})

    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == origin
    assert allowed.headers["access-control-allow-origin"] == origin
    assert "x-request-id" in allowed.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in other.headers


def test_the_secret_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    """Made once, the same from then on, readable by nobody else; one that is damaged is not used."""
    path = tmp_path / "folder" / "secret"

    first = read_secret(path)

    assert len(first) == 32
    assert read_secret(path) == first
    assert path.stat().st_mode & 0o077 == 0
    assert [one.name for one in path.parent.iterdir()] == ["secret"]
    assert read_secret(None) != read_secret(None)
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        read_secret(path)
    with pytest.raises(ConfigError, match="cannot be used"):
        read_secret(path / "below-a-file")
