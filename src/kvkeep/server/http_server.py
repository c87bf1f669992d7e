"""uvicorn around an app: connections without requests are closed, and the service hears of the stop."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvkeep.server.app import create_app
from kvkeep.server.service import Service

__all__ = ["HttpServer"]

_log = logging.getLogger("kvkeep.server")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048


class HttpServer(uvicorn.Server):
    """Serves a service. `run()` blocks until a signal or `should_exit`; the service is closed by then.

    The first SIGINT or SIGTERM stops accepting and lets requests finish for `drain_s`; a second SIGINT
    ends at once.
    """

    def __init__(self, service: Service, *, max_connections: int = 10_000) -> None:
        settings = service.settings
        self.service = service
        self._doorkeeper = _Doorkeeper(
            max_connections,
            idle_s=settings.idle_connection_s,
            stalled_s=settings.body_timeout_s,
        )
        super().__init__(
            uvicorn.Config(
                create_app(service),
                host=settings.host.strip("[]"),
                port=settings.port,
                # A callable that makes protocols is all that uvicorn needs of the class.
                http=self._doorkeeper,  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=max(1, round(settings.idle_connection_s)),
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
            )
        )

    @property
    def url(self) -> str:
        """Where it listens; of port 0 the one that was free. Only once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return self._doorkeeper.num_open

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _log.info("kvkeep serves %s at %s", self.service.model_id, self.url)
            self._watching = asyncio.create_task(self._stop_without_model())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.begin_stop()
        await super().shutdown(sockets)

    async def _stop_without_model(self) -> None:
        """A server whose model cannot be loaded is of no use; `service.failure` says why."""
        try:
            await self.service.loaded()
        except Exception:  # noqa: BLE001  the service has logged it
            self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals while serving; unlike uvicorn, not raise them again: the stop was in order."""
        if current_thread() is not main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Doorkeeper:
    """Makes the protocol of every connection, and closes one without request where there are too many."""

    def __init__(self, max_connections: int, *, idle_s: float, stalled_s: float) -> None:
        self._max_connections = max_connections
        self.idle_s = idle_s
        self.stalled_s = stalled_s
        self.num_open = 0
        self._idle: dict[_Connection, None] = {}  # the longest idle first

    def __call__(self, **arguments: Any) -> "_Connection":
        return _Connection(self, **arguments)

    def opened(self, connection: "_Connection") -> None:
        """Count it; somebody idle makes room."""
        self.num_open += 1
        if self.num_open > self._max_connections and self._idle:
            longest = next(iter(self._idle))
            del self._idle[longest]
            longest.transport.close()
        self.is_idle(connection)

    def closed(self, connection: "_Connection") -> None:
        """Count it no more."""
        self.num_open -= 1
        self._idle.pop(connection, None)

    def is_idle(self, connection: "_Connection") -> None:
        """It waits for a request."""
        self._idle[connection] = None

    def is_busy(self, connection: "_Connection") -> None:
        """It has a request."""
        self._idle.pop(connection, None)


class _Connection(HttpToolsProtocol):
    """Closed when no whole head of a request has come in time, or nothing of an answer is taken for long.

    uvicorn's own timer begins after the first response, and every byte stops it.
    """

    def __init__(self, doorkeeper: _Doorkeeper, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._doorkeeper = doorkeeper
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(transport)
        self._doorkeeper.opened(self)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_stall_timer()
        self._doorkeeper.closed(self)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._doorkeeper.is_busy(self)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.cycle.response_complete:
            self._doorkeeper.is_idle(self)
            self._start_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_stall_timer()
        self._watch_for_stall()

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()

    def _watch_for_stall(self) -> None:
        num_bytes = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(
            self._doorkeeper.stalled_s, self._abort_stalled, num_bytes
        )

    def _abort_stalled(self, num_bytes: int) -> None:
        """Who reads slowly may go on; closing would wait for what is never taken."""
        if self.transport.get_write_buffer_size() < num_bytes:
            self._watch_for_stall()
        else:
            self.transport.abort()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._doorkeeper.idle_s, self._close_idle)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_idle(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
