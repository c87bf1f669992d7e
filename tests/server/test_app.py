"""The server as a whole, over real HTTP: what every route has, and the basic ones."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kvkeep import LLM, __version__
from kvkeep.config.server import ServerSettings
from kvkeep.errors import ConfigError
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

_PROMPT = "Once upon a time there was a cat. " * 20


def completion(client: httpx.Client, **body: Any) -> httpx.Response:
    """POST /v1/completions."""
    asked = {"prompt": _PROMPT, "max_tokens": 8, "temperature": 0, **body}
    return client.post("/v1/completions", json=asked)


def open_leases(server: RunningServer) -> int:
    """Requests that hold blocks, by the engine's own count."""
    return server.service.engine.num_running


def test_health_version_and_models(server: RunningServer) -> None:
    """A ready server says so, and what it serves."""
    with server.client() as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/version").json() == {"version": __version__}
        models = client.get("/v1/models").json()
        one = client.get("/v1/models/tiny").json()

    assert models["object"] == "list"
    assert models["data"] == [one]
    assert one["id"] == "tiny"
    assert one["object"] == "model"
    assert one["max_model_len"] == 8192


def test_tokenize_and_detokenize(server: RunningServer) -> None:
    """Text, content and conversations become the tokens the model would get, and text again."""
    text = "The cat sat."
    messages = [{"role": "user", "content": text}]
    with server.client() as client:
        by_prompt = client.post("/tokenize", json={"prompt": text}).json()
        by_content = client.post(
            "/tokenize", json={"content": text, "return_token_strs": True}
        ).json()
        of_chat = client.post("/tokenize", json={"messages": messages}).json()
        back = client.post("/detokenize", json={"tokens": by_prompt["tokens"]}).json()

    assert by_prompt["tokens"] == by_content["tokens"]
    assert by_prompt["count"] == len(by_prompt["tokens"]) > 2
    assert "".join(by_content["token_strs"]) == text
    assert of_chat["count"] > by_prompt["count"]
    assert of_chat["message_starts"] == [0]
    assert back == {"prompt": text, "content": text}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 7}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "another"}, 404, "model"),
        ("/tokenize", {"messages": [{"content": "x"}]}, 400, "messages[0]"),
        ("/detokenize", {"tokens": [99_999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**40]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/v1/nothing", {}, 404, None),
        ("/version", {}, 405, None),
    ],
)
def test_errors_have_the_body_of_openais_api(
    server: RunningServer, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    """Message, type, param and code, whatever went wrong, and the request's id."""
    with server.client() as client:
        response = client.post(path, json=body)

    assert response.status_code == status
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["param"] == param
    assert response.headers["x-request-id"]


def test_errors_of_messages_have_the_body_of_anthropics_api(server: RunningServer) -> None:
    """Routes of the other protocol answer in its own shape, also for what is no JSON at all."""
    with server.client() as client:
        response = client.post(
            "/v1/messages", content="{", headers={"content-type": "application/json"}
        )

    body = response.json()
    assert response.status_code == 400
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"]


def test_a_clients_request_id_comes_back(server: RunningServer) -> None:
    """One that could not be a header, or is very long, is replaced."""
    with server.client() as client:
        kept = client.get("/version", headers={"x-request-id": "abc-123"})
        too_long = client.get("/version", headers={"x-request-id": "x" * 500})
        none = client.get("/version")

    assert kept.headers["x-request-id"] == "abc-123"
    assert len(too_long.headers["x-request-id"]) == 32
    assert none.headers["x-request-id"] != too_long.headers["x-request-id"]


def test_the_second_request_finds_the_prompt_in_the_cache(server: RunningServer) -> None:
    """The whole way: HTTP, engine, cache and back."""
    with server.client() as client:
        first = completion(client).json()
        second = completion(client).json()

    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    details = second["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] > second["usage"]["prompt_tokens"] // 2


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: RunningServer, is_stream: bool) -> None:
    """Streamed or not: nobody computes for a closed connection, and others go on."""
    asked = {
        "prompt": _PROMPT,
        "max_tokens": 4000,
        "temperature": 0,
        "ignore_eos": True,
        "stream": is_stream,
    }
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: open_leases(server) == 1, "it runs")
    wait_until(lambda: open_leases(server) == 0, "it is ended", timeout_s=5)
    with server.client() as client:
        assert completion(client).status_code == 200


def test_a_model_that_loads_answers_503_until_it_is_there() -> None:
    """The port is open at once; what needs the model says when to come again."""
    may_load = threading.Event()

    def load() -> LLM:
        assert may_load.wait(20)
        return LLM("tiny", capacity="16MB")

    with running_server(load) as server, server.client() as client:
        health, completions = client.get("/health"), completion(client)
        models, version = client.get("/v1/models"), client.get("/version")
        may_load.set()
        wait_until(lambda: client.get("/health").status_code == 200, "the model is loaded")
        assert completion(client).status_code == 200

    assert health.status_code == completions.status_code == models.status_code == 503
    assert health.json()["status"] == "loading"
    assert int(completions.headers["retry-after"]) >= 1
    assert "loading" in completions.json()["error"]["message"]
    assert version.status_code == 200


@pytest.fixture(scope="module")
def short() -> Iterator[RunningServer]:
    """A server whose requests may take half a second."""
    with running_server(request_timeout_s=0.5) as running:
        yield running


def test_a_request_that_takes_too_long_is_ended(short: RunningServer) -> None:
    """504 in time, and the engine is free again."""
    with short.client() as client:
        late = completion(client, max_tokens=7000, ignore_eos=True)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert late.headers["x-should-retry"] == "false"
        assert completion(client, max_tokens=2).status_code == 200

    wait_until(lambda: open_leases(short) == 0, "it is ended", timeout_s=5)


def test_a_failed_engine_is_told_and_nobody_hangs() -> None:
    """503 from then on, also for requests that were under way."""
    with running_server() as server, server.client() as client:
        engine = server.service.engine
        assert completion(client).status_code == 200
        # The engine's thread looks for work there; without it, it cannot go on.
        del engine._thread.engine._generations
        wait_until(lambda: not engine.is_healthy, "the thread has ended")
        health, refused = client.get("/health"), completion(client)
        assert (health.status_code, refused.status_code) == (503, 503)
        assert health.json()["status"] == "failed"
        assert "_generations" in refused.json()["error"]["message"]
        engine._thread.engine._generations = {}


def test_names_of_the_model_can_be_added() -> None:
    """Clients that insist on a name of their own find it; others are told what there is."""
    with (
        running_server(model_names=["gpt-small"]) as server,
        server.client() as client,
    ):
        names = [one["id"] for one in client.get("/v1/models").json()["data"]]
        by_name = completion(client, model="gpt-small")
        unknown = completion(client, model="gpt-large")

    assert names == ["tiny", "gpt-small"]
    assert by_name.json()["model"] == "gpt-small"
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70_000}, "port=70000"),
        ({"max_body_bytes": 0}, "max_body_bytes=0"),
        ({"max_queued": True}, "max_queued=True"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        ({"request_timeout_s": 0}, "request_timeout_s=0"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s=nan"),
        ({"drain_s": -1}, "drain_s=-1"),
        ({"log_format": "xml"}, "log_format='xml'"),
        ({"metrics_compat": "all"}, "metrics_compat='all'"),
        ({"api_keys": "one-key-as-text"}, "api_keys is one text"),
        ({"api_keys": ["short"]}, "5 characters"),
        ({"api_keys": ["with a tab\there"]}, "printable"),
        ({"api_keys": ["the-same-key"], "admin_key": "the-same-key"}, "one of api_keys"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    """Field, value and remedy, before anything listens."""
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**settings)
