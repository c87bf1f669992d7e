"""The same over Valkey's own client, GLIDE, for who prefers that: `redis://host?client=glide`.

It needs the package valkey-glide-sync. A value, in one piece for GLIDE, is copied once more; everything about
connections, their number too, is GLIDE's business.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any, Protocol, TypeVar

from kvkeep.errors import ConfigError
from kvkeep.tiers.base import Got, Miss, MissCause, PutOutcome
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, SettingError, Turns
from kvkeep.tiers.resp_connection import unavailable
from kvkeep.tiers.resp_glide_config import glide_config
from kvkeep.tiers.resp_protocol import ServerError
from kvkeep.tiers.resp_transport import (
    Deleted,
    Named,
    Patch,
    SetRequest,
    SetResult,
    end_of,
    patch_result,
    patch_words,
)
from kvkeep.tiers.resp_url import RespUrl
from kvkeep.tiers.stored_value import ROOM_BYTES, End, is_tail, judge
from kvkeep.tiers.views import scatter

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
        self._config = glide_config(glide, url, timeout_s)
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
        """GET into memory of its own, with room for the usual labels, and from there into the views."""

        def get(target: memoryview, client: _Client) -> int | None:
            found = client.get(key, buffer=target)
            return None if found is None else int(found)

        try:
            memory = memoryview(bytearray(num_bytes + ROOM_BYTES))
            length = self._call(partial(get, memory), deadline)
            if isinstance(length, ServerError) and "buffer" in length.text.lower():
                there = self._call(lambda client: client.strlen(key), deadline)
                if isinstance(there, int) and is_tail(there - num_bytes):
                    memory = memoryview(bytearray(there))
                    length = self._call(partial(get, memory), deadline)
        except CallError as error:
            return Miss(error.cause, str(error))
        if isinstance(length, ServerError):
            return _miss(length)
        if length is None:
            return Miss(MissCause.ABSENT)
        if not is_tail(length - num_bytes):
            return Miss(MissCause.SHORT, f"{length} bytes there, {num_bytes} wanted")
        scatter(memory[:num_bytes], views)
        return judge(views, memory[num_bytes:length], num_bytes)

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        """SET NX; parts are joined, since GLIDE takes one value."""
        value = b"".join([*request.parts, request.tail])
        num_bytes = len(value) - len(request.tail)
        if num_bytes != request.num_bytes:
            return SetResult(PutOutcome.FAILED, f"{num_bytes} bytes, {request.num_bytes} announced")
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

    def ends(self, keys: Sequence[bytes], num_bytes: int, deadline: Deadline) -> list[End | None]:
        """A batch of STRLEN and GETRANGE."""
        calls: list[tuple[Any, ...]] = []
        for key in keys:
            calls += [("strlen", key), ("getrange", key, -num_bytes, -1)]
        try:
            answers = self._batched(calls, deadline)
        except CallError:
            return [None] * len(keys)
        return [
            end_of(length, end) for length, end in zip(answers[::2], answers[1::2], strict=True)
        ]

    def patch_many(self, patches: Sequence[Patch], deadline: Deadline) -> list[SetResult]:
        """A batch of EVAL, which GLIDE has no method for."""
        calls = [("custom_command", patch_words(patch)) for patch in patches]
        try:
            return [patch_result(answer) for answer in self._batched(calls, deadline)]
        except CallError as error:
            return [SetResult(PutOutcome.FAILED, str(error))] * len(patches)

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

    def scan(self, prefix: bytes, timeout_s: float, *, end_bytes: int) -> Iterator[Named]:
        """SCAN through GLIDE's own cursors, and a batch for the ends of each page."""
        cursor: Any = self._glide.ClusterScanCursor() if self._is_cluster else b"0"
        pattern = prefix + b"*"
        while True:
            page = self._call(partial(_scan, cursor, pattern), Deadline(timeout_s))
            if isinstance(page, ServerError):
                raise CallError(MissCause.UNAVAILABLE, page.text)
            cursor, keys = page
            yield from self._named(keys, end_bytes, Deadline(timeout_s))
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

    def _named(self, keys: Sequence[bytes], end_bytes: int, deadline: Deadline) -> list[Named]:
        calls: list[tuple[Any, ...]] = []
        for key in keys:
            calls += [("strlen", key), ("getrange", key, -end_bytes, -1), ("exists", [key])]
        answers = self._batched(calls, deadline)
        ends = [end_of(size, end) for size, end in zip(answers[::3], answers[1::3], strict=True)]
        return [
            Named(key, end)
            for key, end, there in zip(keys, ends, answers[2::3], strict=True)
            if end is not None and there == 1
        ]

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
