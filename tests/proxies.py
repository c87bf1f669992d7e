"""What stands between a tier and a server in tests of faults: slow wires, cut wires, overloaded stores."""

import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from time import sleep

__all__ = ["StoreProxy", "WireProxy", "store_proxy", "wire_proxy"]

_PIECE_BYTES = 4096
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate."
    b"</Message></Error>"
)


class WireProxy:
    """Forwards TCP connections; `bytes_per_s` and `max_bytes` hold for what the server sends."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.bytes_per_s: float | None = None
        # A connection is cut after so many bytes of replies.
        self.max_bytes: int | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_over = Event()
        self._threads: list[Thread] = []
        self._start(self._accept)

    def close(self) -> None:
        """Drop everything."""
        self._is_over.set()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _start(self, work: object, *arguments: object) -> None:
        assert callable(work)
        thread = Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._is_over.is_set():
            if select.select([self._listener], [], [], 0.02)[0]:
                client, _ = self._listener.accept()
                self._start(self._forward, client)

    def _forward(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self.target_port), timeout=5)
            with server:
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        num_replied = 0
        while not self._is_over.is_set():
            for source in select.select([client, server], [], [], 0.02)[0]:
                piece = source.recv(_PIECE_BYTES)
                if not piece:
                    return
                if source is client:
                    server.sendall(piece)
                    continue
                if self.max_bytes is not None and num_replied + len(piece) > self.max_bytes:
                    client.sendall(piece[: max(0, self.max_bytes - num_replied)])
                    return
                num_replied += len(piece)
                client.sendall(piece)
                if self.bytes_per_s is not None:
                    sleep(len(piece) / self.bytes_per_s)


@contextmanager
def wire_proxy(target_port: int) -> Iterator[WireProxy]:
    """A WireProxy for a block."""
    proxy = WireProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.close()


class StoreProxy(ThreadingHTTPServer):
    """Forwards HTTP requests to an object store, or answers them as an overloaded one does.

    Parts of objects have the status that is theirs, which `rclone serve s3` does not give them.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Forwarder)
        self.target_port = target_port
        # The next so many requests are answered 503 SlowDown.
        self.num_refusals = 0
        self.num_refused = 0
        self.delay_s = 0.0
        # Bodies of replies end after so many bytes, and the connection with them.
        self.max_body_bytes: int | None = None
        self.num_body_bytes = 0
        self.lock = Lock()

    @property
    def endpoint(self) -> str:
        """Its address for ObjectTier."""
        return f"http://127.0.0.1:{self.server_port}"

    def takes_refusal(self) -> bool:
        """Whether this request is one of those to be refused."""
        with self.lock:
            if self.num_refusals <= 0:
                return False
            self.num_refusals -= 1
            self.num_refused += 1
            return True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what these tests are about."""


class _Forwarder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StoreProxy

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        sleep(self.server.delay_s)
        if self.server.takes_refusal():
            self._reply(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
            return
        connection = HTTPConnection("127.0.0.1", self.server.target_port, timeout=10)
        try:
            # The signature covers the address that the client knows, which headers keep.
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            self._reply(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        is_part = any(name.lower() == "content-range" for name, _ in headers)
        self.send_response(206 if is_part and status == 200 else status)
        skipped = {"transfer-encoding", "connection", "date", "server"}
        has_length = False
        for name, value in headers:
            if name.lower() not in skipped:
                has_length = has_length or name.lower() == "content-length"
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit = self.server.max_body_bytes
        if limit is not None and len(body) > limit:
            self.wfile.write(body[:limit])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)
            with self.server.lock:
                self.server.num_body_bytes += len(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  named by the base class
        """Say nothing."""


@contextmanager
def store_proxy(target_port: int) -> Iterator[StoreProxy]:
    """A StoreProxy for a block."""
    proxy = StoreProxy(target_port)
    thread = Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
