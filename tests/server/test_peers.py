"""Tenants without an administrator: what one does is no event, no number and no hindrance for another."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.running_server import RunningServer, running_server

ANNA, BERT = "key-of-anna", "key-of-bert"
TEXT = "The treasure lies under the old oak behind the mill. " * 8


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants, of whom each is its own administrator."""
    with running_server(api_keys=(ANNA, BERT), keep_alive_s=0.5) as running:
        yield running


@pytest.fixture
def anna(server: RunningServer) -> Iterator[httpx.Client]:
    """One of them."""
    with server.client(ANNA) as client:
        yield client


@pytest.fixture
def bert(server: RunningServer) -> Iterator[httpx.Client]:
    """The other."""
    with server.client(BERT) as client:
        yield client


def complete(client: httpx.Client, prompt: str = TEXT, **kv_cache: Any) -> dict[str, Any]:
    """The answer to a request that asks this of the cache."""
    body = {"prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}
    answer: dict[str, Any] = client.post("/v1/completions", json=body).raise_for_status().json()
    return answer


def heard(lines: Iterator[str], until: str) -> list[dict[str, Any]]:
    """The events of a stream up to the first of this kind."""
    found: list[dict[str, Any]] = []
    for line in lines:
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
            if found[-1]["type"] == until:
                break
    return found


def test_events_are_those_of_the_asker(anna: httpx.Client, bert: httpx.Client) -> None:
    """Bert hears of his own purge, and of nothing that Anna does."""
    with bert.stream("GET", "/v1/cache/events") as stream:
        lines = stream.iter_lines()
        assert heard(lines, "subscribed")
        complete(anna, session="secret")
        anna.post("/v1/cache/purge", json={"sessions": ["secret"]}).raise_for_status()
        complete(bert, prompt=f"Mine. {TEXT}", session="mine")
        bert.post("/v1/cache/purge", json={"sessions": ["mine"]}).raise_for_status()

        kinds = [(one["type"], one.get("session")) for one in heard(lines, "purged")]

    assert kinds == [("miss", "mine"), ("stored", "mine"), ("purged", None)]


def test_one_tenant_cannot_take_all_streams_of_events(
    server: RunningServer, bert: httpx.Client
) -> None:
    """Anna's ninth is refused, and Bert's first is not."""
    with server.client(ANNA) as many:
        streams = [many.build_request("GET", "/v1/cache/events") for _ in range(9)]
        answers = [many.send(one, stream=True) for one in streams]
        statuses = [one.status_code for one in answers]
        with bert.stream("GET", "/v1/cache/events") as own:
            assert own.status_code == 200
        for one in answers:
            one.close()

    assert statuses == [200] * 8 + [429]


def test_counts_are_those_of_the_asker(anna: httpx.Client, bert: httpx.Client) -> None:
    """What Anna stores and reuses changes no number that Bert sees, and her own."""
    own_before, before = (one.get("/v1/cache").json() for one in (anna, bert))

    for _ in range(2):
        complete(anna, prompt=f"Counted. {TEXT}")

    own = anna.get("/v1/cache").json()
    assert bert.get("/v1/cache").json() == before
    assert own["reused_tokens"] > own_before["reused_tokens"]
    assert own["tiers"]["device"]["entries"] > own_before["tiers"]["device"]["entries"]


def test_a_pin_of_a_request_is_its_tenants(anna: httpx.Client, bert: httpx.Client) -> None:
    """The answer names it; its owner finds it in the list and ends it, and nobody else."""
    name = complete(anna, pin=True)["kv_cache"]["pin"]

    assert [one["name"] for one in anna.get("/v1/cache/pins").json()["data"]] == [name]
    assert bert.get("/v1/cache/pins").json()["data"] == []
    assert bert.delete(f"/v1/cache/pins/{name}").status_code == 404
    assert anna.delete(f"/v1/cache/pins/{name}").status_code == 200


@pytest.mark.parametrize("asked", [{"write": False}, {"ttl": 0}])
def test_a_request_that_leaves_nothing_leaves_no_pin(
    anna: httpx.Client, asked: dict[str, Any]
) -> None:
    """Pins without blocks would stay for ever, one for every prompt; nor does it pin what others left."""
    complete(anna, prompt=f"Nothing of it stays. {asked} {TEXT}", pin=True, **asked)
    complete(anna)

    answer = complete(anna, pin=True, **asked)

    assert answer["kv_cache"] == {"pin": None}
    assert anna.get("/v1/cache/pins").json()["data"] == []


def test_too_much_to_pin_is_refused_as_such() -> None:
    """413 with both numbers, as on the route of pins."""
    body = {"prompt": TEXT, "max_tokens": 1, "kv_cache": {"pin": True}}
    with running_server(llm_options={"pin_share": 0.0}) as small, small.client() as client:
        answer = client.post("/v1/completions", json=body)
        pins = client.get("/v1/cache/pins").json()["data"]

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "pin_cap")
    assert pins == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "entries", None),
        ("GET", "sessions", None),
        ("GET", "pins", None),
        ("POST", "purge", {"all": True}),
        ("PUT", "quotas", {"limit_bytes": 1}),
    ],
)
def test_nobody_names_another_tenant(
    anna: httpx.Client, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """403 for every id, so that nothing is learned of who there is; and lists have none."""
    complete(anna, session="s")

    answer = anna.request(method, f"/v1/cache/{path}", params={"tenant": "0123abcd"}, json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (403, "tenant")
    for kind in ("entries", "sessions", "pins"):
        for row in anna.get(f"/v1/cache/{kind}").json()["data"]:
            assert "tenant" not in row
