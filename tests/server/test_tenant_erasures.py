"""A tenant is erased while its requests run: nothing of what is on its way is kept when it arrives."""

from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import httpx
import pytest

from kvkeep.engine import Piece
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

ANNA, BERT, ADMIN = "key-of-anna", "key-of-bert", "key-of-admin"
TEXT = "The treasure lies under the old oak behind the mill. " * 8
LONG_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A server, the file of its contexts, and its clients."""

    server: RunningServer
    file: Path
    anna: httpx.Client
    bert: httpx.Client
    admin: httpx.Client

    @property
    def anna_id(self) -> str:
        """What the administrator calls Anna, who has a session."""
        self.anna.post("/v1/completions", json=completion("Hello", session="anna-s"))
        sessions = self.admin.get("/v1/cache/sessions").json()["data"]
        (found,) = {one["tenant"] for one in sessions if one["id"] == "anna-s"}
        return str(found)

    def erase(self, tenant: str) -> httpx.Response:
        """All that a tenant has, by its id."""
        body = {"tenant": tenant, "include_pinned": True}
        return self.admin.post("/v1/cache/purge", json=body).raise_for_status()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    """Two tenants and an administrator."""
    file = tmp_path / "contexts"
    with (
        running_server(api_keys=(ANNA, BERT), admin_key=ADMIN, contexts_file=file) as server,
        server.client(ANNA) as anna,
        server.client(BERT) as bert,
        server.client(ADMIN) as admin,
    ):
        yield Kept(server, file, anna, bert, admin)


@contextmanager
def held_steps(server: RunningServer) -> Iterator[Event]:
    """The engine computes nothing until the block is left; the event is set when it would."""
    engine = server.service.llm.engine
    step, would, may = engine.step, Event(), Event()

    def held() -> list[Piece]:
        would.set()
        assert may.wait(LONG_S)
        return step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", held)
        try:
            yield would
        finally:
            may.set()


def erased_meanwhile(kept: Kept, method: str, path: str, body: dict[str, Any]) -> httpx.Response:
    """The answer to a request of Anna's, during which she is erased."""
    tenant, service, calls = kept.anna_id, kept.server.service, list[object]()
    call = service.call

    def counted(work: Callable[[LLM], T]) -> Awaitable[T]:
        calls.append(work)
        return call(work)

    answer: Future[httpx.Response]
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        with held_steps(kept.server) as would:
            answer = pool.submit(kept.anna.request, method, path, json=body)
            assert would.wait(LONG_S)
            patch.setattr(service, "call", counted)
            erasure = pool.submit(kept.erase, tenant)
            wait_until(lambda: calls, "the erasure has begun")
        erasure.result(LONG_S)
        return answer.result(LONG_S)


def completion(prompt: str, salt: str | None = None, session: str | None = None) -> dict[str, Any]:
    """A request of one token."""
    kv_cache = {"salt": salt, "session": session}
    return {"prompt": prompt, "max_tokens": 1, "kv_cache": kv_cache}


def known_tokens(client: httpx.Client, prompt: str, **fields: Any) -> int:
    """How much of a prompt is cached for who asks."""
    answer = client.post("/v1/cache/lookup", json={"prompt": prompt, **fields})
    return int(answer.raise_for_status().json()["known_tokens"])


def stored(client: httpx.Client, text: str = TEXT, **fields: Any) -> str:
    """The id of a response that is kept."""
    body = {"input": text, "max_output_tokens": 1, **fields}
    return str(client.post("/v1/responses", json=body).raise_for_status().json()["id"])


@pytest.mark.parametrize("salt", [None, "of-a-client"])
def test_a_context_that_is_computed_meanwhile_is_not_kept(kept: Kept, salt: str | None) -> None:
    """Its client is told; no name, no block and no token in the file is left."""
    body = {"name": "law", "prompt": TEXT, "salt": salt}

    answer = erased_meanwhile(kept, "POST", "/v1/cache/contexts", body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "erased")
    assert kept.admin.get("/v1/cache/contexts").json()["data"] == []
    assert known_tokens(kept.anna, TEXT, salt=salt) == 0
    assert not kept.file.exists() or b"tokens" not in kept.file.read_bytes()
    again = kept.anna.post("/v1/cache/contexts", json=body)
    assert again.status_code == 201
    assert again.json()["known_tokens"] > 32


def test_a_context_that_is_renewed_meanwhile_stays_erased(kept: Kept) -> None:
    """What a change computes does not bring it back."""
    body = {"name": "law", "prompt": TEXT}
    kept.anna.post("/v1/cache/contexts", json=body).raise_for_status()
    kept.anna.post("/v1/cache/purge", json={"all": True})

    answer = erased_meanwhile(kept, "PATCH", "/v1/cache/contexts/law", {"ttl": "1h"})

    assert answer.status_code == 404, answer.text
    assert kept.admin.get("/v1/cache/contexts").json()["data"] == []
    assert known_tokens(kept.anna, TEXT) == 0
    assert not kept.file.exists()


def test_a_request_with_a_salt_that_runs_meanwhile_leaves_nothing(kept: Kept) -> None:
    """The first one with this salt: that it is the tenant's is known when the request begins."""
    answer = erased_meanwhile(kept, "POST", "/v1/completions", completion(TEXT, "of-a-client"))

    assert answer.status_code == 200
    assert known_tokens(kept.anna, TEXT, salt="of-a-client") == 0


def test_a_response_that_is_made_meanwhile_is_not_kept(kept: Kept) -> None:
    """It is answered, and cannot be read or continued."""
    body = {"input": TEXT, "max_output_tokens": 1}

    answer = erased_meanwhile(kept, "POST", "/v1/responses", body)

    assert answer.status_code == 200
    assert kept.anna.get(f"/v1/responses/{answer.json()['id']}").status_code == 404
    assert kept.anna.get("/v1/cache/sessions").json()["data"] == []


def test_stored_responses_of_a_tenant_are_erased_with_it(kept: Kept) -> None:
    """Those under the salts of its clients too, with their sessions; others keep theirs."""
    erased = [stored(kept.anna), stored(kept.anna, cache_salt="of-a-client")]
    left = stored(kept.bert)

    kept.erase(kept.anna_id)

    for response_id in erased:
        assert kept.anna.get(f"/v1/responses/{response_id}").status_code == 404
        body = {"input": "And?", "previous_response_id": response_id}
        assert kept.anna.post("/v1/responses", json=body).status_code == 400
    assert kept.anna.get("/v1/cache/sessions").json()["data"] == []
    assert kept.bert.get(f"/v1/responses/{left}").status_code == 200
    stored(kept.bert, previous_response_id=left)


def test_of_one_salt_the_responses_go_that_bear_it() -> None:
    """Where no keys are set, salts keep tenants apart."""
    with running_server() as server, server.client() as client:
        erased, left = stored(client, cache_salt="x"), stored(client)

        body = {"salt": "x", "include_pinned": True}
        client.post("/v1/cache/purge", json=body).raise_for_status()

        assert client.get(f"/v1/responses/{erased}").status_code == 404
        assert client.get(f"/v1/responses/{left}").status_code == 200
