"""Pieces of a stream leave as they arrive; to a slow reader a task sends them. Nothing changes places."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from starlette.types import Message

from kvkeep.server import http_server
from kvkeep.server.job_events import BODY_WRITER, BodyWriter
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

_ASKED = {
    "model": "m"
    * 30_000,  # which every chunk repeats, so that they soon fill what the kernel keeps
    "prompt": "Once upon a time",
    "max_tokens": 400,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server that takes every name for its model."""
    with running_server(model_names=("*",)) as running:
        yield running


def read_late(server: RunningServer, body: bytes, is_time: Callable[[], bool]) -> bytes:
    """The answer for a client with a small buffer that begins to read when it is time."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + body)
        wait_until(is_time, "it is time to read")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def token_ids(lines: list[str]) -> list[int]:
    """The tokens of a stream."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]


def test_a_slow_reader_gets_what_a_quick_one_gets(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token is lost, twice, or in another place, also where writing had to wait in between."""
    answers: list[bool] = []
    writer = http_server._CycleWriter
    can_write = cast("property", writer.can_write).fget
    assert can_write is not None

    def watched(self: BodyWriter) -> bool:
        answers.append(can_write(self))
        return answers[-1]

    monkeypatch.setattr(writer, "can_write", property(watched))
    with server.client() as client:
        whole = client.post("/v1/completions", json=_ASKED).json()["choices"][0]["token_ids"]
    body = json.dumps(_ASKED | {"stream": True}).encode()
    answer = read_late(server, body, lambda: False in answers)

    assert token_ids(answer.decode().splitlines()) == whole
    assert answer.count(b"data: [DONE]") == 1
    assert True in answers


class _Client(BodyWriter):
    """Takes every fifth piece from a task only, and now and then slowly."""

    def __init__(self, body: bytes) -> None:
        self._request: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._num_asked = 0
        self._num_sent = 0
        self.num_written = 0
        self.parts: list[bytes] = []

    @property
    def can_write(self) -> bool:
        self._num_asked += 1
        return self._num_asked % 5 > 0

    def write(self, body: bytes) -> None:
        self.num_written += 1
        self.parts.append(body)

    async def receive(self) -> Message:
        if self._request is None:
            await asyncio.Event().wait()
        found, self._request = self._request, None
        assert found is not None
        return found

    async def send(self, message: Message) -> None:
        self._num_sent += 1
        await asyncio.sleep(0.03 if self._num_sent % 3 == 0 else 0)
        self.parts.append(message.get("body", b""))


def scope_of(client: _Client) -> dict[str, Any]:
    """A request of the client's, for an app."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {BODY_WRITER: client},
    }


def test_what_is_written_at_once_does_not_overtake_what_a_task_sends(server: RunningServer) -> None:
    """Pieces that come while a task is sending wait behind it."""
    asked = _ASKED | {"model": "m", "max_tokens": 120}
    with server.client() as other:
        whole = other.post("/v1/completions", json=asked).json()["choices"][0]["token_ids"]
    client = _Client(json.dumps(asked | {"stream": True}).encode())
    loop = server.service.engine._loop
    assert loop is not None
    answered = server.http.config.loaded_app(scope_of(client), client.receive, client.send)
    asyncio.run_coroutine_threadsafe(answered, loop).result(60)

    assert token_ids(b"".join(client.parts).decode().splitlines()) == whole
    assert 0 < client.num_written < 119
