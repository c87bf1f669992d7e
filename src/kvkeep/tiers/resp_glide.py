"""The same over Valkey's own client, GLIDE, for who prefers that: `redis://host?client=glide`.

It needs the package valkey-glide-sync. A value of several parts, or for several buffers, is copied once more;
everything about connections, their number too, is GLIDE's business.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Protocol, TypeVar

from kvkeep.errors import ConfigError
from kvkeep.tiers.base import Got, Miss, MissCause, PutOutcome
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, SettingError, Turns
from kvkeep.tiers.resp_connection import unavailable
from kvkeep.tiers.resp_protocol import ServerError
from kvkeep.tiers.resp_stream import Address, UnixAddress
from kvkeep.tiers.resp_transport import Deleted, Named, SetRequest, SetResult
from kvkeep.tiers.resp_url import RespUrl, TlsFiles
from kvkeep.tiers.views import byte_views, scatter

__all__ = ["GlideTransport", "open_glide"]

T = TypeVar("T")
_SCAN_COUNT = 1000
_MAX_COMMANDS = 1000
# GLIDE has no class for these; parts of its messages, in lower case.
_LOGIN_WORDS = ("wrongpass", "noauth", "authentication")


def open_glide(
    url: RespUrl, *, num_connections: int, timeout_s: float, name: str
) -> "GlideTransport":
    """A client of the servers at an address, which connects at its first call.

    Raises ConfigError where GLIDE is not installed.
    """
    try:
        glide = import_module("glide_sync")
    except ImportError as error:
        raise ConfigError(
            f"url={str(url)!r} asks for client=glide; pip install 'kvkeep[glide]', or leave it out"
        ) from error
    return GlideTransport(
        glide, url, num_connections=num_connections, timeout_s=timeout_s, name=name
    )


class _Client(Protocol):
    """What is used of GLIDE's clients, which may not be installed; its replies have no types here."""

    def get(self, key: bytes, buffer: memoryview | None) -> bytes | None: ...
    def set(
        self, key: bytes, value: bytes | memoryview, conditional_set: object, expiry: object
    ) -> object | None: ...
    def strlen(self, key: bytes) -> int: ...
    def exec(self, batch: object, *, raise_on_error: bool) -> list[Any]: ...
    def scan(self, cursor: object, *, match: bytes, count: int) -> list[Any]: ...
    def ping(self) -> bytes: ...
    def close(self) -> None: ...


class GlideTransport:
    """See RespTransport; one breaker for all servers."""

    def __init__(
        self, glide: ModuleType, url: RespUrl, *, num_connections: int, timeout_s: float, name: str
    ) -> None:
        self._glide = glide
        self._is_cluster = url.is_cluster
        self._config = _config(glide, url, timeout_s)
        self._breaker = Breaker(f"{name} ({url.addresses[0]})")
        self._turns = Turns(num_connections)
        self._opening = BoundedCalls(1, name="glide")
        self._lock = Lock()
        self._client: _Client | None = None
        self._is_open = True

    @property
    def breakers(self) -> Sequence[Breaker]:
        """The one of the whole client."""
        return [self._breaker]

    def exists_many(self, keys: Sequence[bytes], deadline: Deadline) -> list[bool]:
        """A batch of EXISTS."""
        try:
            return [
                answer == 1
                for answer in self._batched([("exists", [key]) for key in keys], deadline)
            ]
        except CallError:
            return [False] * len(keys)

    def get_into(
        self, key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss:
        """GET into the one buffer, or into memory of its own and from there into several."""
        target = views[0] if len(views) == 1 else memoryview(bytearray(num_bytes))

        def get(client: _Client) -> Got | Miss:
            length = client.strlen(key) if not num_bytes else None
            found = client.get(key, buffer=target if num_bytes else None)
            if found is None:
                return Miss(MissCause.ABSENT)
            length = int(found) if length is None else length
            if length != num_bytes:
                return Miss(MissCause.SHORT, f"{length} bytes there, {num_bytes} wanted")
            return Got(num_bytes)

        try:
            found = self._call(get, deadline)
        except CallError as error:
            return Miss(error.cause, str(error))
        if isinstance(found, ServerError):
            return _miss(found)
        if isinstance(found, Got) and len(views) > 1:
            scatter(target, views)
        return found

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        """SET NX; parts are joined, since GLIDE takes one value."""
        views = byte_views(request.parts) if request.is_repeatable else []
        value = views[0] if len(views) == 1 else b"".join(views or request.parts)
        if len(value) != request.num_bytes:
            return SetResult(
                PutOutcome.FAILED, f"{len(value)} bytes, {request.num_bytes} announced"
            )
        glide = self._glide
        expiry = None
        if request.ttl_ms is not None:
            expiry = glide.ExpirySet(glide.ExpiryType.MILLSEC, request.ttl_ms)

        def store(client: _Client) -> PutOutcome:
            reply = client.set(
                request.key,
                value,
                conditional_set=glide.ConditionalChange.ONLY_IF_DOES_NOT_EXIST,
                expiry=expiry,
            )
            return PutOutcome.PRESENT if reply is None else PutOutcome.STORED

        try:
            found = self._call(store, deadline)
        except CallError as error:
            return SetResult(PutOutcome.FAILED, str(error))
        if isinstance(found, ServerError):
            is_full = "OOM" in found.text
            return SetResult(PutOutcome.REFUSED if is_full else PutOutcome.FAILED, found.text)
        return SetResult(found)

    def delete_many(self, keys: Sequence[bytes], deadline: Deadline) -> Deleted:
        """A batch of STRLEN and UNLINK."""
        calls: list[tuple[str, Any]] = []
        for key in keys:
            calls += [("strlen", key), ("unlink", [key])]
        try:
            answers = self._batched(calls, deadline)
        except CallError:
            return Deleted(0, 0, num_failed=len(keys))
        lengths = [
            length if isinstance(length, int) else 0
            for length, num_unlinked in zip(answers[::2], answers[1::2], strict=True)
            if num_unlinked == 1
        ]
        num_failed = sum(not isinstance(answer, int) for answer in answers[1::2])
        return Deleted(len(lengths), sum(lengths), num_failed)

    def touch_many(self, keys: Sequence[bytes], ttl_ms: int | None, deadline: Deadline) -> None:
        """A batch of TOUCH or PEXPIRE."""
        calls: list[tuple[Any, ...]] = [
            ("touch", [key]) if ttl_ms is None else ("pexpire", key, ttl_ms) for key in keys
        ]
        try:
            self._batched(calls, deadline)
        except CallError:
            # Who is not touched goes a little sooner.
            return

    def scan(self, prefix: bytes, timeout_s: float) -> Iterator[Named]:
        """SCAN through GLIDE's own cursors, and a batch for the lengths of each page."""
        cursor: Any = self._glide.ClusterScanCursor() if self._is_cluster else b"0"
        pattern = prefix + b"*"
        while True:
            page = self._call(partial(_scan, cursor, pattern), Deadline(timeout_s))
            if isinstance(page, ServerError):
                raise CallError(MissCause.UNAVAILABLE, page.text)
            cursor, keys = page
            yield from self._named(keys, Deadline(timeout_s))
            if cursor.is_finished() if self._is_cluster else cursor == b"0":
                return

    def ping(self, deadline: Deadline) -> None:
        """PING; connects."""
        try:
            reply = self._call(lambda client: client.ping(), deadline)
        except SettingError:
            raise
        except CallError as error:
            self._breaker.trip(str(error))
            raise
        if isinstance(reply, ServerError):
            raise _login_fault(reply.text)

    def close(self) -> None:
        """Close the client."""
        with self._lock:
            self._is_open = False
            client, self._client = self._client, None
        self._opening.close()
        if client is not None:
            client.close()

    def _named(self, keys: Sequence[bytes], deadline: Deadline) -> list[Named]:
        calls: list[tuple[str, Any]] = []
        for key in keys:
            calls += [("strlen", key), ("exists", [key])]
        answers = self._batched(calls, deadline)
        lengths = zip(keys, answers[::2], answers[1::2], strict=True)
        return [Named(key, size) for key, size, there in lengths if there == 1]

    def _batched(self, calls: Sequence[tuple[Any, ...]], deadline: Deadline) -> list[Any]:
        """The answers to commands, each a method of a batch and its arguments."""
        answers: list[Any] = []
        for first in range(0, len(calls), _MAX_COMMANDS):
            make = self._glide.ClusterBatch if self._is_cluster else self._glide.Batch
            batch = make(is_atomic=False)
            for method, *arguments in calls[first : first + _MAX_COMMANDS]:
                getattr(batch, method)(*arguments)
            some = self._call(partial(_execute, batch), deadline)
            if isinstance(some, ServerError):
                raise CallError(MissCause.UNAVAILABLE, some.text)
            answers += some
        return answers

    def _call(self, work: Callable[[_Client], T], deadline: Deadline) -> T | ServerError:
        """What `work` gives, or the server's error about it; raises CallError for all else."""
        permit = self._breaker.admit()
        if permit is None:
            raise CallError(MissCause.UNAVAILABLE, f"left alone: {self._breaker.reason}")
        try:
            result = self._bounded(work, deadline)
        except CallError as error:
            permit.fail(str(error))
            raise
        except BaseException:
            permit.abandon()
            raise
        permit.succeed()
        return result

    def _bounded(self, work: Callable[[_Client], T], deadline: Deadline) -> T | ServerError:
        glide = self._glide
        if not self._turns.take(deadline.left_s()):
            raise CallError(MissCause.LATE, f"all calls were busy for {deadline.timeout_s:g} s")
        try:
            return work(self._opened(deadline))
        except glide.TimeoutError as error:
            raise CallError(MissCause.LATE, f"no answer within {deadline.timeout_s:g} s") from error
        except (glide.ConnectionError, glide.ClosingError) as error:
            raise _login_fault(str(error)) from error
        except glide.GlideError as error:
            found = _server_error(str(error))
            fault = unavailable(found)
            if fault is not None:
                raise fault from error
            return found
        finally:
            self._turns.give_back()

    def _opened(self, deadline: Deadline) -> _Client:
        if self._client is None:
            client = self._opening.run(self._connect, deadline)
            with self._lock:
                is_first = self._is_open and not self._has_client()
                if is_first:
                    self._client = client
            if not is_first:
                client.close()
        client_now = self._client
        if client_now is None:
            raise CallError(MissCause.UNAVAILABLE, "closed")
        return client_now

    def _has_client(self) -> bool:
        return self._client is not None

    def _connect(self) -> _Client:
        make = self._glide.GlideClusterClient if self._is_cluster else self._glide.GlideClient
        client: _Client = make.create(self._config)
        return client


def _config(glide: ModuleType, url: RespUrl, timeout_s: float) -> object:
    credentials = None
    if url.password is not None:
        credentials = glide.ServerCredentials(password=url.password, username=url.user)
    timeout_ms = max(1, round(timeout_s * 1000))
    options: dict[str, Any] = {
        "addresses": [_node_address(glide, address) for address in url.addresses],
        "use_tls": url.tls is not None,
        "credentials": credentials,
        "request_timeout": timeout_ms,
        "client_name": url.client_name,
        "protocol": getattr(glide.ProtocolVersion, f"RESP{url.protocol}"),
    }
    advanced = {"connection_timeout": timeout_ms, "tls_config": _tls_config(glide, url.tls)}
    if url.is_cluster:
        return glide.GlideClusterClientConfiguration(
            **options, advanced_config=glide.AdvancedGlideClusterClientConfiguration(**advanced)
        )
    return glide.GlideClientConfiguration(
        **options,
        database_id=url.database,
        advanced_config=glide.AdvancedGlideClientConfiguration(**advanced),
    )


def _node_address(glide: ModuleType, address: Address) -> object:
    if isinstance(address, UnixAddress):
        return glide.NodeAddress(unix_socket_path=address.path)
    return glide.NodeAddress(address.host, address.port)


def _tls_config(glide: ModuleType, files: TlsFiles | None) -> object:
    if files is None:
        return None
    try:
        authorities = None if files.ca_file is None else Path(files.ca_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"ca_file={files.ca_file!r}: {error}; give a file in PEM form") from error
    return glide.TlsAdvancedConfiguration(
        use_insecure_tls=None if files.verifies else True,
        root_pem_cacerts=authorities,
        client_cert_path=files.cert_file,
        client_key_path=files.key_file or files.cert_file,
    )


def _scan(cursor: object, pattern: bytes, client: _Client) -> list[Any]:
    return client.scan(cursor, match=pattern, count=_SCAN_COUNT)


def _execute(batch: object, client: _Client) -> list[Any]:
    return client.exec(batch, raise_on_error=False)


def _login_fault(text: str) -> CallError:
    text = " ".join(text.split())
    if any(word in text.lower() for word in _LOGIN_WORDS):
        return SettingError(f"the login is refused ({text}); check user and password in the url")
    return CallError(MissCause.UNAVAILABLE, text)


def _server_error(text: str) -> ServerError:
    return ServerError(text.partition(" ")[0].rstrip(":"), text)


def _miss(error: ServerError) -> Miss:
    if "buffer" in error.text.lower():
        return Miss(MissCause.SHORT, error.text)
    is_foreign = "WRONGTYPE" in error.text
    return Miss(MissCause.CORRUPT if is_foreign else MissCause.UNAVAILABLE, error.text)
