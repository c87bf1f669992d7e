"""What one connection may do: heads of bounded size, and requests behind others."""

import json
import logging
import socket
from threading import Event

import pytest

from tests.running_server import RunningServer
from tests.servers import wait_until

_MB = 2**20
_NEXT = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
_HEAD = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
_CHUNKED = _HEAD + b"transfer-encoding: chunked\r\n\r\n"


def connect(server: RunningServer) -> socket.socket:
    """A bare connection."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET /health HTTP/1.1\r\n", b"x-filler: " + b"a" * 54 + b"\r\n"),
        (b"GET /health HTTP/1.1\r\nx-filler: ", b"a" * 64),
        (b"GET /", b"a" * 64),
        (_CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-trailer: " + b"a" * 53 + b"\r\n"),
        (_CHUNKED + b"2;", b"a" * 64),
    ],
    ids=["lines", "one line", "path", "trailers", "chunk extension"],
)
def test_what_is_beside_a_body_is_bounded(server: RunningServer, begin: bytes, part: bytes) -> None:
    """It would all be kept, before anybody is asked for a key."""
    sent = 0
    with connect(server) as connection:
        connection.sendall(begin)
        try:
            while sent < 32 * _MB:
                connection.sendall(part * 4096)
                sent += len(part) * 4096
        except OSError:
            pass

    assert sent < 32 * _MB


def test_a_head_that_is_too_long_is_answered(server: RunningServer) -> None:
    """431, and the connection ends."""
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"a" * 70_000)
        assert connection.recv(4096).startswith(b"HTTP/1.1 431 ")
        assert connection.recv(4096) == b""


def test_long_heads_and_bodies_in_small_chunks_are_taken(server: RunningServer) -> None:
    """A head of 60,000 bytes, again and again on one connection; a byte in each chunk."""
    body = json.dumps({"prompt": "harbour bell " * 2000}).encode()
    with server.client() as client:
        for _ in range(3):
            headers = {"x-filler": "a" * 60_000, "content-type": "application/json"}
            pieces = (body[at : at + 1] for at in range(len(body)))
            answer = client.post("/tokenize", content=pieces, headers=headers)

            assert answer.status_code == 200, answer.text


def test_a_whole_head_that_is_too_long_is_answered(server: RunningServer) -> None:
    """431 too where it has come before anybody looks: the loop is kept busy meanwhile."""
    head = b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 120_000 + b"\r\n\r\n"
    with connect(server) as connection:
        wait_until(lambda: server.http.num_connections, "the connection is open")
        loop = server.http.servers[0].get_loop()
        is_sent = Event()
        loop.call_soon_threadsafe(is_sent.wait, 10)
        connection.sendall(head)
        is_sent.set()

        assert connection.recv(4096).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
def test_leaving_ends_the_request_before_a_pipelined_one(
    server: RunningServer, is_late: bool, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that has sent its next request already ends the one that runs, like any other."""
    asked = {"prompt": "a", "max_tokens": 7000, "ignore_eos": True, "stream": is_stream}
    body = json.dumps(asked).encode()
    head = _HEAD.replace(b"/tokenize", b"/v1/completions")
    engine = server.service.engine
    with caplog.at_level(logging.ERROR), connect(server) as connection:
        length = f"content-length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + length + body + (b"" if is_late else _NEXT))
        wait_until(lambda: engine.num_running, "it runs")
        if is_late:
            connection.sendall(_NEXT)
        connection.close()
        wait_until(lambda: not engine.num_open, "it has ended", timeout_s=3.0)

    assert not caplog.records


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    """More of them than may wait, too."""
    with connect(server) as connection:
        connection.sendall(_NEXT * 40)
        answers = b""
        while answers.count(b'{"status":"ok"}') < 40:
            received = connection.recv(65536)
            assert received, answers
            answers += received


def answer_of(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of what comes until the connection ends."""
    received = b""
    while part := connection.recv(65_536):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head.lower(), body


def completion(version: bytes, **fields: object) -> bytes:
    """A request in a version of the protocol."""
    body = json.dumps({"model": "tiny", "prompt": "Harbour", "max_tokens": 3} | fields).encode()
    head = b"POST /v1/completions HTTP/%s\r\nhost: localhost\r\ncontent-length: %d\r\n"
    return head % (version, len(body)) + b"content-type: application/json\r\n\r\n" + body


def test_a_client_without_chunks_gets_a_bare_stream(server: RunningServer) -> None:
    """What HTTP/1.0 knows of the end of a body of unknown length is the end of the connection."""
    with connect(server) as connection:
        connection.sendall(completion(b"1.0", stream=True))
        head, body = answer_of(connection)

    assert b" 200 " in head.splitlines()[0]
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")
    events = [one for one in body.split(b"\n\n") if one]
    assert all(one.startswith(b"data: ") for one in events)


def test_a_client_without_chunks_gets_other_answers_as_ever(server: RunningServer) -> None:
    """With their length, and the end of the connection."""
    with connect(server) as connection:
        connection.sendall(completion(b"1.0"))
        head, body = answer_of(connection)

    assert b"content-length: %d" % len(body) in head
    assert json.loads(body)["usage"]["completion_tokens"] == 3
