"""What a client may not do to others: big, slow, deep, many."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError
from kvkeep.server.limits import Seats
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

_KEY = "a-key-for-the-tests"
_OTHER_KEY = "another-key-for-them"
_TURN = [{"role": "user", "content": "x"}]
_LONG = {"prompt": "Again and again. " * 4, "max_tokens": 7000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def small() -> Iterator[RunningServer]:
    """A server with narrow limits."""
    with running_server(
        llm_options={"max_requests": 2},
        max_body_bytes=100_000,
        max_prompt_tokens=500,
        max_queued=1,
        body_timeout_s=1.0,
        idle_connection_s=1.0,
        max_connections=40,
    ) as running:
        yield running


def is_well(server: RunningServer, within_s: float = 2.0) -> bool:
    """Whether somebody else is served meanwhile, in time."""
    began_s = time.monotonic()
    with server.client() as client:
        response = client.post("/tokenize", json={"prompt": "hello"})
    return response.status_code == 200 and time.monotonic() - began_s < within_s


def connect(server: RunningServer) -> socket.socket:
    """A bare connection."""
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.settimeout(10)
    return connection


def head(server: RunningServer, **headers: object) -> bytes:
    """The head of a POST to /tokenize."""
    named = {"host": f"localhost:{server.port}", "content-type": "application/json", **headers}
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in named.items()]
    return "\r\n".join(["POST /tokenize HTTP/1.1", *lines, "", ""]).encode()


def test_a_body_that_says_it_is_too_big_is_refused_unread(small: RunningServer) -> None:
    """The answer comes although not a byte of the body was sent."""
    with connect(small) as connection:
        connection.sendall(head(small, content_length=100_000_000))
        answer = connection.recv(4096).decode()

    assert answer.startswith("HTTP/1.1 413")
    assert "100000000 bytes" in answer


def test_clients_that_send_100_megabytes_get_to_read_the_refusal(small: RunningServer) -> None:
    """With a length, and without one; memory does not grow with what is thrown away."""

    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1_000_000

    with small.client() as client:
        whole = client.post("/tokenize", content=b"x" * 100_000_000)
        chunked = client.post("/tokenize", content=chunks())

    assert whole.status_code == chunked.status_code == 413
    assert whole.json()["error"]["code"] == "request_too_large"
    assert is_well(small)


def test_a_body_that_never_ends_is_given_up(small: RunningServer) -> None:
    """A byte now and then does not keep a request open."""
    with connect(small) as connection:
        connection.sendall(head(small, content_length=50))
        began_s = time.monotonic()
        answer = b""
        while not answer and time.monotonic() - began_s < 8:
            connection.sendall(b" ")
            connection.settimeout(0.2)
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                continue

    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("is_used", [True, False])
@pytest.mark.parametrize("sent", [b"", b"POST /tokenize HT", b"GET /version HTTP/1.1\r\nx: "])
def test_a_connection_without_a_whole_head_is_closed(
    small: RunningServer, sent: bytes, is_used: bool
) -> None:
    """Also when a byte comes now and then; whether it has had a request before or not."""
    with connect(small) as connection:
        if is_used:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(sent)
        began_s = time.monotonic()
        connection.settimeout(0.2)
        while time.monotonic() - began_s < 8:
            try:
                if sent:
                    connection.sendall(b"a")
                if connection.recv(4096) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
    assert time.monotonic() - began_s < 5


def test_more_connections_than_allowed_take_the_place_of_idle_ones(small: RunningServer) -> None:
    """Who sends a request is served, however many others only sit there."""
    with ExitStack() as idle:
        for _ in range(150):
            idle.enter_context(connect(small))
        assert is_well(small)
        assert is_well(small)


def test_connections_with_requests_are_not_closed_for_others(small: RunningServer) -> None:
    """A stream goes on while hundreds of connections come and go."""
    with small.client() as client, client.stream("POST", "/v1/completions", json=_LONG) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        with ExitStack() as idle:
            for _ in range(150):
                idle.enter_context(connect(small))
            assert [next(lines) for _ in range(200)]


@pytest.mark.parametrize("depth", [1_000, 20_000])
@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions", "/v1/messages"])
def test_deep_json_is_answered(small: RunningServer, path: str, depth: int) -> None:
    """With an error of the client's, wherever the depth is."""
    deep = '{"a":' * (depth // 10) + "[" * depth + "]" * depth + "}" * (depth // 10)
    bodies = [
        "[" * depth + "]" * depth,
        '{"messages":[{"role":"user","content":"x"}],"tools":[' + deep + "]}",
        '{"messages":' + deep + "}",
    ]
    with small.client() as client:
        for body in bodies:
            response = client.post(path, content=body, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), response.text
    assert is_well(small)


def test_a_prompt_of_a_million_tokens_is_refused_quickly(server: RunningServer) -> None:
    """By its characters; and one with more tokens than fit, by its beginning."""
    very_long = "ab " * 1_500_000
    long = "the cat sat " * 8_000
    with server.client() as client:
        for prompt in (very_long, long):
            began_s = time.monotonic()
            refused = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "context_length_exceeded"
            assert time.monotonic() - began_s < 2
    assert is_well(server)


def test_prompts_are_limited_in_tokens_however_they_come(small: RunningServer) -> None:
    """As text, as token ids, as a conversation."""
    ids = list(range(10, 1010))
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": ids}),
        ("/v1/completions", {"prompt": "cat " * 600}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "cat " * 600}]}),
    ]
    with small.client() as client:
        for path, body in bodies:
            response = client.post(path, json={"max_tokens": 1, **body})
            assert response.status_code == 400
            assert response.json()["error"]["code"] == "context_length_exceeded"
            assert "500" in response.json()["error"]["message"]


def test_more_requests_than_can_wait_get_429(small: RunningServer) -> None:
    """Two run, one waits, the fourth is told when to come again; a place that is left is taken."""
    with ExitStack() as streams, small.client() as client:

        def begin() -> httpx.Response:
            one = streams.enter_context(small.client())
            return streams.enter_context(one.stream("POST", "/v1/completions", json=_LONG))

        running = [begin() for _ in range(3)]
        assert {response.status_code for response in running} == {200}
        refused = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        running[0].close()
        wait_until(lambda: begin().status_code == 200, "the place is free")


def test_a_key_may_have_only_so_many_requests() -> None:
    """One key's crowd leaves room for the other's."""
    with (
        running_server(api_keys=[_KEY, _OTHER_KEY], max_requests_per_key=1) as server,
        server.client(_KEY) as one,
        server.client(_KEY) as more,
        server.client(_OTHER_KEY) as other,
        one.stream("POST", "/v1/completions", json=_LONG) as stream,
    ):
        assert stream.status_code == 200
        short = {"prompt": "x", "max_tokens": 1}
        assert more.post("/v1/completions", json=short).status_code == 429
        assert other.post("/v1/completions", json=short).status_code == 200


def test_seats_are_counted_by_tenant() -> None:
    """Taken and given back, over all and for each."""
    one = Tenant(TenantId("one"), None, is_admin=False)
    two = Tenant(TenantId("two"), None, is_admin=False)
    seats = Seats(max_jobs=3, max_per_tenant=2)

    seats.take(one)
    seats.take(one)
    with pytest.raises(ApiError, match="max_requests_per_key=2"):
        seats.take(one)
    seats.take(two)
    with pytest.raises(ApiError, match="max_queued"):
        seats.take(two)
    seats.give_back(one)
    seats.take(two)

    assert seats.num_taken == 3


def test_an_answer_that_cannot_be_as_long_as_asked_for_says_so() -> None:
    """In the header for warnings, with both numbers; not where it can."""
    asked = {
        "/v1/completions": {"prompt": "x", "max_tokens": 500},
        "/v1/chat/completions": {"messages": _TURN, "max_completion_tokens": 500},
        "/v1/responses": {"input": "x", "max_output_tokens": 500},
        "/v1/messages": {"messages": _TURN, "max_tokens": 500},
    }
    with running_server(llm_options={"max_context": 64}) as short, short.client() as client:
        for path, body in asked.items():
            answer = client.post(path, json=body)
            few = {name: 1 if value == 500 else value for name, value in body.items()}

            assert answer.status_code == 200, answer.text
            assert "tokens, not 500" in answer.headers["x-kv-warnings"]
            assert "x-kv-warnings" not in client.post(path, json=few).headers


def test_every_output_takes_a_seat() -> None:
    """A job for more outputs than there are seats is alone; one for more than a tenant's is never served."""
    one = Tenant(TenantId("one"), None, is_admin=False)
    open_seats = Seats(max_jobs=3, max_per_tenant=None)
    open_seats.take(one, 2)
    with pytest.raises(ApiError, match="max_queued"):
        open_seats.take(one, 2)
    open_seats.give_back(one, 2)
    open_seats.take(one, 5)
    with pytest.raises(ApiError, match="max_queued"):
        open_seats.take(one)

    seats = Seats(max_jobs=9, max_per_tenant=3)
    seats.take(one, 2)
    with pytest.raises(ApiError, match="max_requests_per_key=3") as later:
        seats.take(one, 2)
    with pytest.raises(ApiError, match="n=4") as never:
        seats.take(one, 4)

    assert (later.value.status, never.value.status) == (429, 400)


def test_slow_readers_do_not_slow_others(server: RunningServer) -> None:
    """A client that asks for a stream and never reads does not stop the engine, nor other streams."""
    body = json.dumps(_LONG).encode()
    request = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body
    with ExitStack() as slow:
        for _ in range(4):
            connection = slow.enter_context(connect(server))
            connection.sendall(request)
        wait_until(lambda: server.service.engine.num_running == 4, "they run")
        asked = {"prompt": "x", "max_tokens": 16, "ignore_eos": True}
        began_s = time.monotonic()
        with server.client() as client:
            assert client.post("/v1/completions", json=asked).status_code == 200
        assert time.monotonic() - began_s < 5
    wait_until(lambda: server.service.engine.num_running == 0, "they are ended", timeout_s=10)


def test_a_client_that_takes_nothing_is_cut_off(small: RunningServer) -> None:
    """Megabytes of an answer are not kept for it, neither is its connection."""
    word = small.service.prompts.encode_text(" caterpillar").ids[-1]
    body = json.dumps({"tokens": [word] * 15_000}).encode()
    request = head(small, content_length=len(body)).replace(b"/tokenize", b"/detokenize")
    wait_until(lambda: small.http.num_connections == 0, "those of other tests are closed")
    with connect(small) as connection:
        # The kernel takes what fits into its own buffers; so many answers do not.
        for _ in range(200):
            try:
                connection.settimeout(0.5)
                connection.sendall(request + body)
            except OSError:
                break
        wait_until(lambda: small.http.num_connections == 0, "it is cut off", timeout_s=15)
    assert is_well(small)


def test_many_requests_at_once_are_all_answered(server: RunningServer) -> None:
    """Sixty clients, each with a prompt of its own."""

    async def work() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return await asyncio.gather(
                *(
                    client.post("/v1/completions", json={"prompt": f"Tale {at}.", "max_tokens": 8})
                    for at in range(60)
                )
            )

    assert {response.status_code for response in asyncio.run(work())} == {200}
