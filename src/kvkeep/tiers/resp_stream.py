"""Connections as streams of bytes, whose every call ends at its deadline: TCP, TLS and Unix sockets."""

import errno
import ipaddress
import select
import socket
import ssl
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, SettingError
from kvkeep.tiers.views import rest_of

__all__ = ["Address", "Stream", "TcpAddress", "UnixAddress", "connect"]

_TIMEVAL = struct.Struct("ll")
# Linux takes 1024 views in one call, and all other systems that have these calls too.
_MAX_VIEWS = 1000
_TLS_PIECE_BYTES = 1 << 18
_TOLERANCE = 1.04
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, by name or number, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """The file of a Unix socket."""

    path: str

    def __str__(self) -> str:
        return self.path


Address: TypeAlias = TcpAddress | UnixAddress
# As the socket module has them, different for each family.
_Place: TypeAlias = str | tuple[object, ...]


class Stream(ABC):
    """Bytes to and from one server. Every method raises CallError, after which only `close` may be called."""

    @abstractmethod
    def send(
        self, pieces: Sequence[bytes | memoryview], num_bytes: int, deadline: Deadline
    ) -> None:
        """Send all bytes of the pieces, together `num_bytes`, one after another."""

    def send_bytes(self, content: bytes, deadline: Deadline) -> None:
        """Send bytes, a command usually."""
        self.send([content], len(content), deadline)

    @abstractmethod
    def receive_some(self, view: memoryview, deadline: Deadline) -> int:
        """Read at least one byte and at most `view` holds; how many."""

    @abstractmethod
    def scatter_some(self, views: Sequence[bytearray | memoryview], deadline: Deadline) -> int:
        """Read at least one byte into the views, in order, and no more than they hold; how many."""

    @abstractmethod
    def fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Read until all views are full."""

    @abstractmethod
    def fileno(self) -> int:
        """The socket, to wait for several."""

    @abstractmethod
    def is_stale(self) -> bool:
        """Whether an idle stream was closed by the server, or holds bytes that nobody asked for."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection."""


class _PlainStream(Stream):
    """A blocking socket with the kernel's own time limits: one system call moves a whole value."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._limit_s = 0.0
        self._waiting = select.poll()
        self._waiting.register(sock, select.POLLIN)
        sock.settimeout(None)

    def send(
        self, pieces: Sequence[bytes | memoryview], num_bytes: int, deadline: Deadline
    ) -> None:
        rest, left = pieces, num_bytes
        while left:
            self._limit(deadline.left_s())
            try:
                sent = self._sock.sendmsg(rest[:_MAX_VIEWS])
            except OSError as error:
                raise _fault(error, deadline) from error
            left -= sent
            if left:
                rest = rest_of([memoryview(piece) for piece in rest], sent)

    def send_bytes(self, content: bytes, deadline: Deadline) -> None:
        left_s = deadline.left_s()
        if not left_s <= self._limit_s <= left_s * _TOLERANCE:
            self._limit(left_s)
        try:
            sent = self._sock.send(content)
        except OSError as error:
            raise _fault(error, deadline) from error
        if sent < len(content):
            self.send([memoryview(content)[sent:]], len(content) - sent, deadline)

    def receive_some(self, view: memoryview, deadline: Deadline) -> int:
        return self.scatter_some([view], deadline)

    def scatter_some(
        self, views: Sequence[bytearray | memoryview], deadline: Deadline, flags: int = 0
    ) -> int:
        left_s = deadline.left_s()
        if not left_s <= self._limit_s <= left_s * _TOLERANCE:
            self._limit(left_s)
        try:
            received = self._sock.recvmsg_into(views[:_MAX_VIEWS], 0, flags)[0]
        except OSError as error:
            raise _fault(error, deadline) from error
        if not received:
            raise _closed()
        return received

    def fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        rest = views
        while rest:
            rest = rest_of(rest, self.scatter_some(rest, deadline, socket.MSG_WAITALL))

    def fileno(self) -> int:
        return self._sock.fileno()

    def is_stale(self) -> bool:
        return bool(self._waiting.poll(0))

    def close(self) -> None:
        self._sock.close()

    def _limit(self, left_s: float) -> None:
        """Let the kernel wait as long as is left; a few percent more are not worth two system calls."""
        if left_s <= self._limit_s <= left_s * _TOLERANCE:
            return
        # In the middle, so that it fits the next call too, which has a little more or less time left.
        self._limit_s = left_s * (1 + _TOLERANCE) / 2
        # Zero would mean for ever.
        limit = _TIMEVAL.pack(int(self._limit_s), max(1, int(self._limit_s % 1 * 1e6)))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)


class _TlsStream(Stream):
    """TLS knows neither lists of views nor the kernel's time limits."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._waiting = select.poll()
        self._waiting.register(sock, select.POLLIN)

    def send(
        self, pieces: Sequence[bytes | memoryview], num_bytes: int, deadline: Deadline
    ) -> None:
        for piece in pieces:
            rest = memoryview(piece)
            while len(rest):
                self._sock.settimeout(deadline.left_s())
                try:
                    sent = self._sock.send(rest[:_TLS_PIECE_BYTES])
                except OSError as error:
                    raise _fault(error, deadline) from error
                rest = rest[sent:]

    def receive_some(self, view: memoryview, deadline: Deadline) -> int:
        self._sock.settimeout(deadline.left_s())
        try:
            received = self._sock.recv_into(view)
        except OSError as error:
            raise _fault(error, deadline) from error
        if not received:
            raise _closed()
        return received

    def scatter_some(self, views: Sequence[bytearray | memoryview], deadline: Deadline) -> int:
        return self.receive_some(memoryview(views[0]), deadline)

    def fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        for view in views:
            rest = view
            while len(rest):
                rest = rest[self.receive_some(rest, deadline) :]

    def fileno(self) -> int:
        return self._sock.fileno()

    def is_stale(self) -> bool:
        return bool(self._waiting.poll(0))

    def close(self) -> None:
        self._sock.close()


def connect(
    address: Address, tls: ssl.SSLContext | None, names: BoundedCalls, deadline: Deadline
) -> Stream:
    """Open a stream; names of hosts are looked up by `names`, since nothing else bounds that.

    Raises SettingError where the server's certificate is refused, CallError for all else.
    """
    try:
        if isinstance(address, UnixAddress):
            sock = _connected(socket.AF_UNIX, address.path, deadline)
        else:
            sock = _first_that_answers(address, names, deadline)
    except OSError as error:
        raise _fault(error, deadline) from error
    if tls is None:
        return _PlainStream(sock)
    host = address.host if isinstance(address, TcpAddress) else ""
    return _with_tls(sock, tls, host, deadline)


def _first_that_answers(
    address: TcpAddress, names: BoundedCalls, deadline: Deadline
) -> socket.socket:
    def look_up() -> list[tuple[int, _Place]]:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return [(family, place) for family, _, _, _, place in found]

    places = look_up() if _is_number(address.host) else names.run(look_up, deadline)
    for at, (family, place) in enumerate(places, 1):
        part = deadline.at_most(deadline.left_s() / (len(places) - at + 1))
        try:
            sock = _connected(family, place, part)
        except OSError:
            if at == len(places):
                raise
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return sock
    raise CallError(MissCause.UNAVAILABLE, f"{address.host} has no address")


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _connected(family: int, place: _Place, deadline: Deadline) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(deadline.left_s())
        sock.connect(place)
    except BaseException:
        sock.close()
        raise
    return sock


def _with_tls(sock: socket.socket, tls: ssl.SSLContext, host: str, deadline: Deadline) -> Stream:
    try:
        sock.settimeout(deadline.left_s())
        return _TlsStream(tls.wrap_socket(sock, server_hostname=host))
    except ssl.SSLCertVerificationError as error:
        sock.close()
        raise SettingError(
            f"the certificate is refused: {error.verify_message}; give its authority as ca_file"
        ) from error
    except OSError as error:
        sock.close()
        raise _fault(error, deadline) from error
    except BaseException:
        sock.close()
        raise


def _closed() -> CallError:
    return CallError(MissCause.UNAVAILABLE, "the server closed the connection")


def _fault(error: OSError, deadline: Deadline) -> CallError:
    # A blocking socket whose time limit is over says EAGAIN, one that connects EINPROGRESS.
    if isinstance(error, TimeoutError | BlockingIOError) or error.errno == errno.ETIMEDOUT:
        return CallError(MissCause.LATE, f"no answer within {deadline.timeout_s:g} s")
    text = str(error)
    with suppress(AttributeError):
        text = error.strerror or text
    return CallError(MissCause.UNAVAILABLE, text)
