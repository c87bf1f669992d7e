"""uvicorn around an app: connections have bounds in bytes and time, and the service hears of the stop."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

import uvicorn
from uvicorn._types import ASGI3Application, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from kvkeep.server.app import create_app
from kvkeep.server.job_events import BODY_WRITER, BodyWriter
from kvkeep.server.listening import listening_sockets
from kvkeep.server.service import Service

__all__ = ["HttpServer"]

_log = logging.getLogger("kvkeep.server")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BACKLOG = 2048
# What requests of which time is up have to tell their clients, before their tasks are cancelled.
_ENDING_S = 5
# Of a request beside its body; a body in many small chunks has some more for each byte.
_MAX_HEAD_BYTES = 2**16
_BYTES_BESIDE_BYTE = 16
# What has been received is counted after so many bytes.
_PART_BYTES = 2**12
_TOO_LONG_HEAD = b"HTTP/1.1 431 Too Long\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# So many requests may wait behind another on a connection before no more is read, not even that it ends.
_MAX_PIPELINED = 8


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
                timeout_graceful_shutdown=round(settings.drain_s) + _ENDING_S,
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

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end. Raises ConfigError where nobody can listen at the host and port."""
        settings = self.service.settings
        super().run(sockets or listening_sockets(settings.host.strip("[]"), settings.port))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _log.info("%s listens; %s is being loaded", self.url, self.service.model_id)
            self._watching = asyncio.create_task(self._stop_without_model())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        drain_s = self.service.settings.drain_s
        self.service.begin_stop()
        _log.info("stopping: %d requests have up to %g s", self.service.num_open, drain_s)
        ending = asyncio.create_task(self._end_jobs(drain_s))
        await super().shutdown(sockets)
        ending.cancel()
        _log.info("stopped")

    async def _end_jobs(self, drain_s: float) -> None:
        """Let clients hear that their time is up; uvicorn would cut them off."""
        await asyncio.sleep(drain_s)
        await self.service.end_jobs()

    async def _stop_without_model(self) -> None:
        """A server whose model cannot be loaded is of no use; `service.failure` says why."""
        try:
            await self.service.loaded()
        except Exception:  # noqa: BLE001  the service has logged it
            self.should_exit = True
        else:
            _log.info("kvkeep serves %s at %s", self.service.model_id, self.url)

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


class _CycleWriter(BodyWriter):
    """Writes without a task: uvicorn's `send` waits for nothing but for writing that is paused."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def can_write(self) -> bool:
        return not self._cycle.flow.write_paused

    def write(self, body: bytes) -> None:
        assert self.can_write
        sending = self._cycle.send({"type": "http.response.body", "body": body, "more_body": True})
        try:
            sending.send(None)
        except StopIteration:
            return
        raise AssertionError("sending was to be done at once")


class _BareSender:
    """Answers one whose protocol knows no chunks: a body of unknown length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._is_bare = False
        cycle.keep_alive = False

    async def send(self, message: ASGISendEvent) -> None:
        """As the cycle does it, without chunks."""
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message.get("headers", ())]
            self._is_bare = b"content-length" not in names
            if self._is_bare:
                self._cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and self._is_bare:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class _Connection(HttpToolsProtocol):
    """Closed when no whole head of a request has come in time, or nothing of an answer is taken for long.

    uvicorn's own timer begins after the first response, and every byte stops it.
    """

    def __init__(self, doorkeeper: _Doorkeeper, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._doorkeeper = doorkeeper
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        # Of the request that is being received.
        self._num_bytes = 0
        self._num_body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
        super().connection_made(transport)
        self._doorkeeper.opened(self)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        # A request that comes whole in one read is bounded like one in many.
        for at in range(0, len(data), _PART_BYTES):
            if self.transport.is_closing():
                return
            self._receive_part(data[at : at + _PART_BYTES])

    def _receive_part(self, data: bytes) -> None:
        self._num_bytes += len(data)
        super().data_received(data)
        most = _MAX_HEAD_BYTES + (1 + _BYTES_BESIDE_BYTE) * self._num_body_bytes
        if self._num_bytes > most and not self.transport.is_closing():
            if self._running is None or self._running.response_complete:
                self.transport.write(_TOO_LONG_HEAD)
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_bytes = self._num_body_bytes = 0

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # uvicorn tells the newest request alone, which may wait behind the one that runs.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._stop_timer()
        self._stop_stall_timer()
        self._doorkeeper.closed(self)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._doorkeeper.is_busy(self)
        super().on_headers_complete()
        if getattr(self.cycle, "scope", None) is self.scope:  # none was made for an upgrade
            self.scope["state"][BODY_WRITER] = _CycleWriter(self.cycle)
            if self.scope["http_version"] != "1.1":
                self.cycle.send = _BareSender(self.cycle).send  # type: ignore[method-assign]
        if 0 < len(self.pipeline) <= _MAX_PIPELINED:
            self.flow.resume_reading()

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
