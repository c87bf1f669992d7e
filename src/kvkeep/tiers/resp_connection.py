"""One connection to a RESP server: greeting, commands, and values without a copy."""

import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Self

from kvkeep.errors import ConfigError, TierError
from kvkeep.tiers.base import Got, Miss, MissCause, PutOutcome
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, SettingError
from kvkeep.tiers.resp_protocol import (
    MAX_SKIP_BYTES,
    Reply,
    ReplyReader,
    ServerError,
    encode,
    encode_set_head,
    encode_set_tail,
)
from kvkeep.tiers.resp_stream import Address, Stream, connect
from kvkeep.tiers.resp_transport import SetRequest
from kvkeep.tiers.resp_url import RespUrl, TlsFiles
from kvkeep.tiers.stored_value import judge
from kvkeep.tiers.views import byte_views

__all__ = [
    "Login",
    "RespConnection",
    "WrongPartsError",
    "open_login",
    "unavailable",
]

# The server is there and cannot serve, whatever is asked.
_UNAVAILABLE_CODES = frozenset(
    {"LOADING", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "UNKILLABLE", "NOAUTH", "DENIED"}
    | {"MOVED", "ASK"}
)
_REFUSED_LOGIN_CODES = ("WRONGPASS", "NOAUTH")


class WrongPartsError(TierError):
    """The parts of an object are not as long together as was said; nothing of them is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Login:
    """What every new connection of a tier says and needs."""

    user: str | None
    password: str | None = field(repr=False)
    database: int
    protocol: int
    client_name: str
    tls: ssl.SSLContext | None
    names: BoundedCalls


def open_login(url: RespUrl) -> Login:
    """What the address says about connections; raises ConfigError where TLS files cannot be read."""
    return Login(
        user=url.user,
        password=url.password,
        database=url.database,
        protocol=url.protocol,
        client_name=url.client_name,
        tls=None if url.tls is None else _tls_context(url.tls),
        names=BoundedCalls(1, name="names"),
    )


def _tls_context(files: TlsFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=files.ca_file)
    except OSError as error:
        raise ConfigError(f"ca_file={files.ca_file!r}: {error}; give a file in PEM form") from error
    if not files.verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if files.cert_file is not None:
        try:
            context.load_cert_chain(files.cert_file, files.key_file)
        except OSError as error:
            raise ConfigError(
                f"cert_file={files.cert_file!r}, key_file={files.key_file!r}: {error}; "
                "give a certificate and its key in PEM form"
            ) from error
    return context


def unavailable(error: ServerError) -> CallError | None:
    """The fault that an error of the server stands for, None where it concerns one key or command."""
    if error.code not in _UNAVAILABLE_CODES:
        return None
    if error.code in ("MOVED", "ASK"):
        return CallError(
            MissCause.UNAVAILABLE, f"{error}: it belongs to a cluster; write redis+cluster://"
        )
    return CallError(MissCause.UNAVAILABLE, error.text)


class RespConnection:
    """Commands and replies in order, by one thread at a time.

    After an exception, or once `is_usable` is False, it must be closed: replies may be on their way.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reader = ReplyReader(stream)
        self.is_usable = True
        # Whether, idle, it was closed by the server, or is out of step.
        self.is_stale = stream.is_stale

    @classmethod
    def open(cls, address: Address, login: Login, deadline: Deadline) -> Self:
        """Connect and log in; raises SettingError where the server refuses that, CallError otherwise."""
        connection = cls(connect(address, login.tls, login.names, deadline))
        try:
            connection._greet(login, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def send(self, command: bytes, deadline: Deadline) -> None:
        """Send commands, each of which is answered by one reply."""
        self._stream.send_bytes(command, deadline)

    def reply(self, deadline: Deadline) -> Reply:
        """The next reply."""
        return self._reader.reply(deadline)

    def ask(self, command: bytes, deadline: Deadline) -> Reply:
        """Send one command and wait for its reply."""
        self.send(command, deadline)
        return self._reader.reply(deadline)

    def get_into(
        self, key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss | ServerError:
        """GET into byte views that are `num_bytes` long together, if the object is."""
        self._stream.send_bytes(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key), deadline)
        value = self._reader.value_into(views, num_bytes, deadline)
        if value is None:
            return Miss(MissCause.ABSENT)
        if isinstance(value, ServerError):
            return value
        if value.tail is not None:
            return judge(views, value.tail, num_bytes)
        if value.length <= MAX_SKIP_BYTES:
            self._reader.skip_bulk(value.length, deadline)
        else:
            self.is_usable = False
        return Miss(MissCause.SHORT, f"{value.length} bytes there, {num_bytes} wanted")

    def set(self, request: SetRequest, deadline: Deadline) -> PutOutcome | ServerError:
        """SET unless the key is there. Raises WrongPartsError, and what going through the parts raises."""
        num_bytes = request.num_bytes + len(request.tail)
        head = encode_set_head(request.key, num_bytes, request.ttl_ms)
        tail = request.tail + encode_set_tail(request.ttl_ms)
        if request.is_repeatable:
            views = byte_views(request.parts)
            _check_length(sum(map(len, views)), request.num_bytes)
            num_bytes = len(head) + request.num_bytes + len(tail)
            self._stream.send([head, *views, tail], num_bytes, deadline)
        else:
            self._send_produced(head, request, deadline)
            self.send(tail, deadline)
        reply = self._reader.reply(deadline)
        if isinstance(reply, ServerError):
            return reply
        return PutOutcome.PRESENT if reply is None else PutOutcome.STORED

    def fileno(self) -> int:
        """The socket, to wait for several."""
        return self._stream.fileno()

    def close(self) -> None:
        """Drop the connection."""
        self._stream.close()

    def _send_produced(self, head: bytes, request: SetRequest, deadline: Deadline) -> None:
        # Each part is sent before the next is asked for: its memory may be used again for that.
        self.send(head, deadline)
        num_sent = 0
        for part in _timed(request.parts, deadline):
            num_sent += part.nbytes
            if num_sent > request.num_bytes:
                break
            self._stream.send(byte_views([part]), part.nbytes, deadline)
        _check_length(num_sent, request.num_bytes)

    def _greet(self, login: Login, deadline: Deadline) -> None:
        if login.protocol == 2 or not self._says_hello(login, deadline):
            if login.password is not None:
                names = [] if login.user is None else [login.user.encode()]
                reply = self.ask(encode(b"AUTH", *names, login.password.encode()), deadline)
                _check_login(reply)
            # A name is for people who look at the server; a server may forbid to give one.
            self.ask(encode(b"CLIENT", b"SETNAME", login.client_name.encode()), deadline)
        if login.database:
            reply = self.ask(encode(b"SELECT", b"%d" % login.database), deadline)
            if isinstance(reply, ServerError):
                raise _refusal(reply, f"database {login.database}")
        # Without a password nothing before this says whether one is wanted.
        _check_login(self.ask(encode(b"PING"), deadline))

    def _says_hello(self, login: Login, deadline: Deadline) -> bool:
        """Log in with version 3; False where the server does not know it."""
        words = [b"HELLO", b"3"]
        if login.password is not None:
            words += [b"AUTH", (login.user or "default").encode(), login.password.encode()]
        reply = self.ask(encode(*words, b"SETNAME", login.client_name.encode()), deadline)
        if isinstance(reply, ServerError) and (
            reply.code == "NOPROTO" or reply.text.lower().startswith("err unknown command")
        ):
            return False
        _check_login(reply)
        return True


def _timed(parts: Iterable[memoryview], deadline: Deadline) -> Iterator[memoryview]:
    """The parts, the deadline prolonged by what it took to make them."""
    start = monotonic()
    for part in parts:
        deadline.prolong(monotonic() - start)
        yield part
        start = monotonic()
    deadline.prolong(monotonic() - start)


def _check_length(found: int, wanted: int) -> None:
    if found != wanted:
        raise WrongPartsError(f"the parts have {found} bytes, {wanted} were announced")


def _check_login(reply: Reply) -> None:
    if isinstance(reply, ServerError):
        # A user without leave to PING may well be one that may GET.
        if reply.code == "NOPERM":
            return
        raise _refusal(reply, "the login")


def _refusal(error: ServerError, what: str) -> CallError:
    if error.code in _REFUSED_LOGIN_CODES:
        return SettingError(f"{what} is refused ({error}); check user and password in the url")
    if error.code == "ERR" and "DB index" in error.text:
        return SettingError(f"{what} is refused ({error}); give one that the server has")
    return CallError(MissCause.UNAVAILABLE, f"{what} is refused: {error}")
