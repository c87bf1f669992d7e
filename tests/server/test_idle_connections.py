"""Ten thousand clients that only sit there, at a server in a process with a limit of files of its own."""

import logging
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

import httpx
import psutil
import pytest

from tests.server.test_serve import Served, completion, serve

_log = logging.getLogger(__name__)
_NUM_IDLE = 10_000
_OTHER_FILES = 500
_NUM_ASKED = 30
# An idle connection has a transport, a parser and a timer, and no buffer that anybody has filled.
_MOST_BYTES = 64_000


@pytest.fixture
def allowed_files() -> Iterator[None]:
    """As many files as connections need, if this process may have them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _NUM_IDLE + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"a process may open {hard} files here, and {needed} are needed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def idle_connections(served: Served) -> Iterator[list[socket.socket]]:
    """So many open connections without a request."""
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with ExitStack() as opened:
        yield [
            opened.enter_context(socket.create_connection(address, timeout=30))
            for _ in range(_NUM_IDLE)
        ]


def least_s(client: httpx.Client) -> float:
    """Seconds that a small request takes at its best: what others take away is not the server's doing."""
    seconds = []
    for _ in range(_NUM_ASKED):
        began_s = perf_counter()
        assert client.post("/tokenize", json={"prompt": "hello"}).status_code == 200
        seconds.append(perf_counter() - began_s)
    return min(seconds)


@pytest.mark.slow
@pytest.mark.usefixtures("allowed_files")
def test_ten_thousand_idle_connections_do_not_hurt_others(tmp_path: Path) -> None:
    """Requests beside them are answered as before and as fast, all stay open, each costs little memory."""
    with serve(tmp_path, "--idle-connection", "600") as served, served.client() as client:
        alone = completion(client, max_tokens=32)["choices"]
        process = psutil.Process(served.process.pid)
        before_s, before_bytes = least_s(client), process.memory_info().rss
        with idle_connections(served) as idle:
            with served.client() as newcomer:
                beside = completion(newcomer, max_tokens=32)["choices"]
                beside_s = least_s(newcomer)
            each_bytes = (process.memory_info().rss - before_bytes) / len(idle)
            _log.info(
                "%.0f bytes for an idle connection; a small request takes %.1f ms alone, %.1f beside them",
                each_bytes, before_s * 1000, beside_s * 1000,
            )  # fmt: skip
            # The first and the last of them can still ask.
            for one in (idle[0], idle[-1]):
                one.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                assert one.recv(4096).startswith(b"HTTP/1.1 200")
        after = completion(client, max_tokens=32)["choices"]

    assert beside == alone == after
    assert beside_s < 5 * before_s
    assert each_bytes < _MOST_BYTES
