"""Who may see what of the cache: keys on every route, an admin key, and tenants who learn nothing."""

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from kvkeep.server.cache_routes import routes
from tests.running_server import RunningServer, running_server

ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
SECRET = "The treasure lies under the old oak behind the mill. " * 8
# What everybody with a key may do, with what is their own.
OPEN = (
    ("POST", "/v1/cache/lookup"),
    ("GET", "/v1/cache/sessions"),
    ("GET", "/v1/cache/contexts"),
)
APP = FastAPI()
APP.include_router(routes())
PATHS = sorted(
    (method.upper(), re.sub(r"{[^}]*}", "x", path))
    for path, methods in APP.openapi()["paths"].items()
    for method in methods
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants and an administrator."""
    with running_server(api_keys=(ANNA, BERT), admin_key=ADMIN) as running:
        yield running


@pytest.fixture(scope="module")
def peers() -> Iterator[RunningServer]:
    """Two tenants, of whom each is its own administrator."""
    with running_server(api_keys=(ANNA, BERT)) as running:
        yield running


def ask(
    server: RunningServer, key: str | None, method: str, path: str, **options: Any
) -> httpx.Response:
    """One request with a key."""
    with server.client(key) as client:
        return client.request(method, path, **options)


def complete(server: RunningServer, key: str, prompt: str, **kv_cache: Any) -> None:
    """A request that leaves its prompt in the cache."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}
    ask(server, key, "POST", "/v1/completions", json=body).raise_for_status()


def test_there_are_routes_to_ask() -> None:
    """The list of routes that the next tests walk is not empty."""
    assert len(PATHS) > 20


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_no_route_answers_without_a_key(server: RunningServer, method: str, path: str) -> None:
    """401, whatever is asked, also for a wrong key."""
    for key in (None, "key-of-nobody"):
        answer = ask(server, key, method, path)

        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/cache"),
        ("GET", "/v1/cache/entries"),
        ("GET", "/v1/cache/events"),
        ("GET", "/v1/cache/pins"),
        ("GET", "/v1/cache/quotas"),
        ("POST", "/v1/cache/purge"),
        ("POST", "/v1/cache/pins"),
        ("POST", "/v1/cache/import"),
        ("POST", "/flush_cache"),
        ("POST", "/reset_prefix_cache"),
    ],
)
def test_administration_needs_the_admin_key(server: RunningServer, method: str, path: str) -> None:
    """Where there is one, an API key is not enough."""
    answer = ask(server, ANNA, method, path, json={"all": True, "name": "p", "prompt": "a"})

    assert answer.status_code == 403, answer.text


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_own_things_need_no_admin_key(server: RunningServer, method: str, path: str) -> None:
    """Everybody may ask about and keep what is their own."""
    body = {"json": {"prompt": "Hello there."}} if method == "POST" else {}

    assert ask(server, ANNA, method, path, **body).status_code == 200


def test_a_tenant_learns_nothing_of_the_prompts_of_another(server: RunningServer) -> None:
    """The same lookup of two strangers has the same answer, whether or not a third has sent that prompt."""
    complete(server, ANNA, SECRET, session="s")

    own = ask(server, ANNA, "POST", "/v1/cache/lookup", json={"prompt": SECRET, "session": "s"})
    other = ask(server, BERT, "POST", "/v1/cache/lookup", json={"prompt": SECRET, "session": "s"})
    changed = ask(server, BERT, "POST", "/v1/cache/lookup", json={"prompt": f"X{SECRET}"})

    assert own.json()["known_tokens"] > 32
    for answer in (other, changed):
        assert answer.json()["known_tokens"] == 0
        assert answer.json()["miss"]["type"] == "first_request"
        assert "cached_text" not in answer.json()["miss"]


def test_names_of_tenants_do_not_meet(server: RunningServer) -> None:
    """Sessions and contexts of one are no others'; closing one's own leaves the other's."""
    for key in (ANNA, BERT):
        complete(server, key, f"Shared words. {SECRET}", session="same")
        body = {"name": "same", "prompt": SECRET}
        assert ask(server, key, "POST", "/v1/cache/contexts", json=body).status_code == 201

    ask(server, BERT, "DELETE", "/v1/cache/sessions/same").raise_for_status()
    ask(server, BERT, "DELETE", "/v1/cache/contexts/same").raise_for_status()

    for path in ("/v1/cache/sessions/same", "/v1/cache/contexts/same"):
        assert ask(server, BERT, "GET", path).status_code == 404
        assert ask(server, ANNA, "GET", path).status_code == 200
    kept = ask(server, ANNA, "POST", "/v1/cache/lookup", json={"prompt": f"Shared words. {SECRET}"})
    assert kept.json()["known_tokens"] > 32


def test_the_administrator_sees_and_removes_everything(server: RunningServer) -> None:
    """Blocks of all tenants are listed, and a purge by tag takes those of all."""
    for key in (ANNA, BERT):
        complete(server, key, f"Tagged. {SECRET}", tags=["doc:5"])
    tagged = ask(server, ADMIN, "GET", "/v1/cache/entries", params={"tag": "doc:5", "limit": 1000})

    receipt = ask(server, ADMIN, "POST", "/v1/cache/purge", json={"tags": ["doc:5"]}).json()

    assert receipt["deleted"] == len(tagged.json()["data"]) > 2
    for key in (ANNA, BERT):
        look = ask(server, key, "POST", "/v1/cache/lookup", json={"prompt": f"Tagged. {SECRET}"})
        assert look.json()["known_tokens"] < 32


def test_peers_administer_only_what_is_their_own(peers: RunningServer) -> None:
    """Without an admin key nobody lists, pins or purges the blocks of another tenant."""
    complete(peers, ANNA, SECRET, tags=["doc:1"], session="s")
    assert ask(peers, ANNA, "GET", "/v1/cache/entries").json()["data"] != []

    assert ask(peers, BERT, "GET", "/v1/cache/entries").json()["data"] == []
    assert ask(peers, BERT, "GET", "/v1/cache/sessions").json()["data"] == []
    for body in ({"all": True}, {"tags": ["doc:1"]}, {"sessions": ["s"]}, {"older_than": 0}):
        receipt = ask(peers, BERT, "POST", "/v1/cache/purge", json=body).json()
        assert receipt["matched"] == 0
    assert ask(peers, BERT, "POST", "/flush_cache").json()["deleted"] == 0
    pinned = {"name": "p", "prompt": SECRET}
    assert ask(peers, ANNA, "POST", "/v1/cache/pins", json=pinned).json()["blocks"] > 0
    assert ask(peers, BERT, "GET", "/v1/cache/pins").json()["data"] == []
    assert ask(peers, BERT, "DELETE", "/v1/cache/pins/p").status_code == 404
    answer = ask(peers, BERT, "PUT", "/v1/cache/quotas/x", json={"limit_bytes": 1})
    assert answer.status_code == 403

    assert ask(peers, ANNA, "DELETE", "/v1/cache/pins/p").status_code == 200
    assert ask(peers, ANNA, "POST", "/v1/cache/purge", json={"all": True}).json()["deleted"] > 0
