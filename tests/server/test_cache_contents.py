"""What blocks are blocks of, when sessions end, and tenants of whom nothing is to be left."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvkeep.tiers import Disk
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

LAW = "The tenant shall keep the garden, the roof and the lighthouse in good order. " * 6
ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
BLOCK = 32


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Two tenants and an administrator; sessions and what only they use end soon."""
    with running_server(
        api_keys=(ANNA, BERT), admin_key=ADMIN, llm_options={"session_ttl": "1s"}
    ) as running:
        yield running


def ask(
    server: RunningServer, key: str | None, method: str, path: str, **options: Any
) -> httpx.Response:
    """One request with a key."""
    with server.client(key) as client:
        return client.request(method, path, **options)


def complete(server: RunningServer, key: str | None, prompt: str, **kv_cache: Any) -> None:
    """A request that leaves its prompt in the cache."""
    body = {"prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}
    ask(server, key, "POST", "/v1/completions", json=body).raise_for_status()


def known_tokens(server: RunningServer, key: str | None, prompt: str) -> int:
    """How much of a prompt is cached."""
    answer = ask(server, key, "POST", "/v1/cache/lookup", json={"prompt": prompt})
    return int(answer.json()["known_tokens"])


def test_a_block_tells_its_text_to_its_tenant_and_the_administrator(server: RunningServer) -> None:
    """Its place in the prompt, its tokens, their text; to others there is no such block."""
    prompt = f"Told. {LAW}"
    complete(server, ANNA, prompt, tags=["told"])
    listed = ask(server, ADMIN, "GET", "/v1/cache/entries", params={"tag": "told"}).json()["data"]
    assert len(listed) > 3
    tokens = ask(server, ANNA, "POST", "/tokenize", json={"prompt": prompt}).json()["tokens"]
    found = {}
    for one in listed:
        path = f"/v1/cache/entries/{one['id']}"
        for key in (ANNA, ADMIN):
            shown = ask(server, key, "GET", path, params={"include": "text"}).json()
            assert shown["tags"] == ["told"]
            found[shown["content"]["start"]] = shown["content"]
        assert ask(server, BERT, "GET", path, params={"include": "text"}).status_code == 404
        assert "content" not in ask(server, ANNA, "GET", path).json()

    assert sorted(found) == list(range(0, len(listed) * BLOCK, BLOCK))
    for start, content in found.items():
        assert content["token_ids"] == tokens[start : start + BLOCK]
    text = "".join(found[start]["text"] for start in sorted(found))
    assert prompt.startswith(text.removeprefix("<s>").lstrip()[:200])
    assert len(text) > 200


def test_text_that_nobody_remembers_is_null() -> None:
    """Blocks that were imported, or sent before many others."""
    with running_server() as server, server.client() as client:
        complete(server, None, f"Forgotten. {LAW}", session="s")
        path = "/v1/cache/sessions/s/export"
        exported = client.post(path).raise_for_status().content
    with running_server() as server, server.client() as client:
        client.post("/v1/cache/import", content=exported).raise_for_status()
        (one, *_) = client.get("/v1/cache/entries").json()["data"]
        shown = client.get(f"/v1/cache/entries/{one['id']}", params={"include": "text"}).json()
        refused = client.get(f"/v1/cache/entries/{one['id']}", params={"include": "all"})

    assert shown == one | {"content": None}
    assert refused.status_code == 400


def test_a_session_ends_at_the_time_it_is_given(server: RunningServer) -> None:
    """Others at that of the settings; contexts at their own."""
    context = {"name": "law", "prompt": f"Context. {LAW}", "ttl": "1h"}
    ask(server, ANNA, "POST", "/v1/cache/contexts", json=context).raise_for_status()
    for name in ("long", "usual"):
        complete(server, ANNA, f"Session {name}. {LAW}", session=name)
    changed = ask(server, ANNA, "PATCH", "/v1/cache/sessions/long", json={"ttl": "1h"}).json()

    assert changed["id"] == "long"
    assert changed["ends_at"] > changed["used_at"]
    wait_until(lambda: known_tokens(server, ANNA, f"Session usual. {LAW}") < BLOCK, "it has ended")
    assert known_tokens(server, ANNA, f"Session long. {LAW}") > BLOCK
    assert known_tokens(server, ANNA, f"Context. {LAW}") > BLOCK
    for body in ({"ttl": "soon"}, {}, {"ttl": 1, "tags": []}):
        answer = ask(server, ANNA, "PATCH", "/v1/cache/sessions/long", json=body)
        assert answer.status_code == 400, answer.text
    for key in (ANNA, BERT):
        answer = ask(server, key, "PATCH", "/v1/cache/sessions/usual", json={"ttl": 1})
        assert answer.status_code == 404, answer.text


def test_contexts_outlast_the_life_of_sessions_after_a_restart(tmp_path: Path) -> None:
    """What stands for them ends with them."""
    disk = Disk(tmp_path / "blocks", "100MB", write_on=("finished", "closing"))
    options = {"session_ttl": "1s", "calibration_folder": None}
    settings: dict[str, Any] = {"tiers": [disk], "contexts_file": tmp_path / "contexts"}
    with running_server(llm_options=options, **settings) as server:
        body = {"name": "law", "prompt": LAW}
        ask(server, None, "POST", "/v1/cache/contexts", json=body).raise_for_status()
        complete(server, None, f"Other. {LAW}", session="s")
    with running_server(llm_options=options, **settings) as server, server.client() as client:
        complete(server, None, f"Other. {LAW}", session="s")
        wait_until(lambda: known_tokens(server, None, f"Other. {LAW}") < BLOCK, "it has ended")
        (context,) = client.get("/v1/cache/contexts").json()["data"]
        assert context["known_tokens"] > BLOCK


def test_a_tenant_that_is_erased_leaves_no_names_and_no_tokens(tmp_path: Path) -> None:
    """Pins and contexts included; a purge that means less leaves the names."""
    file = tmp_path / "contexts"
    with running_server(contexts_file=file) as server, server.client() as client:
        for salt in ("acme", "other"):
            body: dict[str, Any] = {
                "name": "law",
                "prompt": f"{salt} {LAW}",
                "salt": salt,
                "pin": True,
            }
            client.post("/v1/cache/contexts", json=body).raise_for_status()
        tokens = [line.split('"tokens":"')[1][:40] for line in file.read_text().split()]
        for body in ({"salt": "acme"}, {"salt": "acme", "include_pinned": True, "dry_run": True}):
            client.post("/v1/cache/purge", json=body).raise_for_status()
        assert len(client.get("/v1/cache/contexts").json()["data"]) == 2
        body = {"salt": "acme", "include_pinned": True}
        receipt = client.post("/v1/cache/purge", json=body).json()

        assert receipt["deleted"] > 0
        assert receipt["skipped_pinned"] == 0
        (left,) = client.get("/v1/cache/contexts").json()["data"]
        assert left["pinned"] is True
        assert left["known_tokens"] > BLOCK
        assert len(client.get("/v1/cache/pins").json()["data"]) == 1
        written = file.read_text()
        assert tokens[0] not in written
        assert tokens[-1] in written
