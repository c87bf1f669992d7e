"""kvkeep's own server for tests: real HTTP on a free loopback port, in a thread of this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import httpx

from kvkeep.config.server import ServerSettings
from kvkeep.llm import LLM
from kvkeep.server.http_server import HttpServer
from kvkeep.server.service import Service
from tests.servers import free_port, wait_until

__all__ = ["RunningServer", "running_server"]

_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers. `url` is "http://127.0.0.1:PORT"; `service` lives on the loop of its thread."""

    url: str
    port: int
    service: Service
    settings: ServerSettings
    http: HttpServer

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        """A plain HTTP client with the URL as base, and the key if there is one."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30.0, **options)


@contextmanager
def running_server(
    llm: LLM | Callable[[], LLM] | None = None,
    *,
    tiers: Sequence[Any] = (),
    llm_options: dict[str, Any] | None = None,
    max_connections: int = 1000,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Serve `llm`, the bundled model by default, with these ServerSettings until the block is left."""
    port = free_port()
    found = ServerSettings(**{"port": port, "drain_s": 5.0, **settings})
    model = llm or LLM("tiny", tiers=tiers, **{"capacity": "64MB", **(llm_options or {})})
    service = Service(model, found, model_id="tiny")
    server = HttpServer(service, max_connections=max_connections)
    thread = Thread(target=server.run, name="test-server", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server listens")
        assert thread.is_alive(), "the server has ended while it started"
        yield RunningServer(f"http://127.0.0.1:{port}", port, service, found, server)
    finally:
        server.should_exit = True
        thread.join(_STOP_S)
        assert not thread.is_alive(), "the server did not stop"
