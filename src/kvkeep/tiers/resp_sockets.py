"""Our own client of RESP servers: a value moves between the socket and the caller's memory, nowhere else."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvkeep.tiers.base import Got, Miss, MissCause, PutOutcome
from kvkeep.tiers.breaker import Breaker, BreakerRules
from kvkeep.tiers.deadlines import CallError, Deadline, SettingError
from kvkeep.tiers.resp_cluster import ClusterRouter
from kvkeep.tiers.resp_connection import (
    Login,
    RespConnection,
    WrongPartsError,
    open_login,
    unavailable,
)
from kvkeep.tiers.resp_node import RespNode
from kvkeep.tiers.resp_pipeline import KeyCommand, Pipeline
from kvkeep.tiers.resp_protocol import ServerError, encode
from kvkeep.tiers.resp_router import Router, SingleRouter
from kvkeep.tiers.resp_stream import Address
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
from kvkeep.tiers.stored_value import End

__all__ = ["SocketTransport", "open_sockets"]

T = TypeVar("T")
_MAX_HOPS = 4
_SCAN_COUNT = b"1000"
_STORED = SetResult(PutOutcome.STORED)


def open_sockets(
    url: RespUrl, *, num_connections: int, name: str, rules: BreakerRules | None = None
) -> "SocketTransport":
    """A client of the servers at an address; connects to none yet."""
    login = open_login(url)

    def make_node(address: Address) -> RespNode:
        return RespNode(address, login, num_connections=num_connections, name=name, rules=rules)

    router: Router
    if url.is_cluster:
        router = ClusterRouter(url.addresses, make_node)
    else:
        router = SingleRouter(make_node(url.addresses[0]))
    return SocketTransport(router, login)


@dataclass(frozen=True, slots=True)
class _Page:
    cursor: bytes
    found: list[Named]


class SocketTransport:
    """See RespTransport; every server has connections and a breaker of its own."""

    def __init__(self, router: Router, login: Login) -> None:
        self._router = router
        self._login = login
        self._pipeline = Pipeline(router)

    @property
    def breakers(self) -> Sequence[Breaker]:
        """One for each server."""
        return [node.breaker for node in self._router.known]

    def exists_many(self, keys: Sequence[bytes], deadline: Deadline) -> list[bool]:
        """One EXISTS for each key, since a cluster's node takes no keys of different slots at once."""
        commands = [KeyCommand(key, encode(b"EXISTS", key)) for key in keys]
        return [answer == 1 for answer in self._pipeline.run(commands, deadline)]

    def get_into(
        self, key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss:
        """GET; nothing is read of a value of another length."""

        def get(connection: RespConnection) -> Got | Miss | ServerError:
            return connection.get_into(key, views, num_bytes, deadline)

        try:
            found: Got | Miss | ServerError = self._routed(key, get, deadline)
        except CallError as error:
            return Miss(error.cause, str(error))
        if isinstance(found, ServerError):
            # A list or a hash: something else than a value, which no put of ours has left there.
            is_foreign = found.code == "WRONGTYPE"
            return Miss(MissCause.CORRUPT if is_foreign else MissCause.UNAVAILABLE, found.text)
        return found

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        """SET NX; parts that can be gone through once only are not sent after a redirect."""

        def store(connection: RespConnection) -> PutOutcome | ServerError:
            return connection.set(request, deadline)

        num_hops = _MAX_HOPS if request.is_repeatable else 1
        try:
            found = self._routed(request.key, store, deadline, num_hops=num_hops)
        except (CallError, WrongPartsError) as error:
            return SetResult(PutOutcome.FAILED, str(error))
        if isinstance(found, ServerError):
            is_full = found.code == "OOM"
            return SetResult(PutOutcome.REFUSED if is_full else PutOutcome.FAILED, found.text)
        return _STORED if found is PutOutcome.STORED else SetResult(found)

    def ends(self, keys: Sequence[bytes], num_bytes: int, deadline: Deadline) -> list[End | None]:
        """STRLEN and GETRANGE for each key."""
        commands = [
            KeyCommand(key, word) for key in keys for word in (_strlen(key), _end(key, num_bytes))
        ]
        answers = self._pipeline.run(commands, deadline)
        return [
            end_of(length, end) for length, end in zip(answers[::2], answers[1::2], strict=True)
        ]

    def patch_many(self, patches: Sequence[Patch], deadline: Deadline) -> list[SetResult]:
        """EVAL, since between two commands a value could go, or change its length."""
        commands = [KeyCommand(patch.key, encode(*patch_words(patch))) for patch in patches]
        return [patch_result(answer) for answer in self._pipeline.run(commands, deadline)]

    def delete_many(self, keys: Sequence[bytes], deadline: Deadline) -> Deleted:
        """UNLINK, which leaves the work of freeing memory to another thread of the server."""
        commands = [
            KeyCommand(key, encode(word, key)) for key in keys for word in (b"STRLEN", b"UNLINK")
        ]
        answers = self._pipeline.run(commands, deadline)
        lengths = [
            length if isinstance(length, int) else 0
            for length, num_unlinked in zip(answers[::2], answers[1::2], strict=True)
            if num_unlinked == 1
        ]
        num_failed = sum(not isinstance(answer, int) for answer in answers[1::2])
        return Deleted(len(lengths), sum(lengths), num_failed)

    def touch_many(self, keys: Sequence[bytes], ttl_ms: int | None, deadline: Deadline) -> None:
        """TOUCH, or PEXPIRE, which counts as a use too."""
        if ttl_ms is None:
            commands = [KeyCommand(key, encode(b"TOUCH", key)) for key in keys]
        else:
            digits = b"%d" % ttl_ms
            commands = [KeyCommand(key, encode(b"PEXPIRE", key, digits)) for key in keys]
        self._pipeline.run(commands, deadline)

    def scan(self, prefix: bytes, timeout_s: float, *, end_bytes: int) -> Iterator[Named]:
        """SCAN with MATCH on every server, and the ends of what a page names."""
        fault: CallError | None = None
        for node in self._router.nodes(Deadline(timeout_s)):
            try:
                yield from _scan_node(node, prefix, timeout_s, end_bytes)
            except CallError as error:
                self._router.note_fault()
                fault = error
        if fault is not None:
            raise fault

    def ping(self, deadline: Deadline) -> None:
        """Log in on one server; of a cluster the one that lists the others."""
        try:
            node = self._router.nodes(deadline)[0]
            with node.lease(deadline) as connection:
                reply = connection.ask(encode(b"PING"), deadline)
                self._check(reply)
        except SettingError:
            raise
        except CallError as error:
            for breaker in self.breakers:
                breaker.trip(str(error))
            raise

    def close(self) -> None:
        """Close idle connections, and those in use when their calls end."""
        self._router.close()
        self._login.names.close()

    def _routed(
        self,
        key: bytes,
        work: Callable[[RespConnection], T | ServerError],
        deadline: Deadline,
        *,
        num_hops: int = _MAX_HOPS,
    ) -> T | ServerError:
        """What `work` gives on the server that has the key, after at most `num_hops` - 1 redirects."""
        node, is_asking = self._router.node_of(key, deadline), False
        for _ in range(num_hops):
            try:
                with node.lease(deadline) as connection:
                    if is_asking:
                        connection.ask(encode(b"ASKING"), deadline)
                    result = work(connection)
                    if isinstance(result, ServerError):
                        self._check(result)
            except CallError:
                self._router.note_fault()
                raise
            if not (isinstance(result, ServerError) and self._router.is_redirect(result)):
                return result
            redirect = self._router.follow(result, node)
            node, is_asking = redirect.node, redirect.is_asking
        raise CallError(MissCause.UNAVAILABLE, f"the key is at {node.address} now")

    def _check(self, reply: object) -> None:
        """Raise CallError where a server says that it cannot serve."""
        if isinstance(reply, ServerError) and not self._router.is_redirect(reply):
            fault = unavailable(reply)
            if fault is not None:
                raise fault


def _scan_node(node: RespNode, prefix: bytes, timeout_s: float, end_bytes: int) -> Iterator[Named]:
    page = _Page(b"0", [])
    while True:
        deadline = Deadline(timeout_s)
        with node.lease(deadline) as connection:
            page = _scan_page(connection, page.cursor, prefix, end_bytes, deadline)
        yield from page.found
        if page.cursor == b"0":
            return


def _scan_page(
    connection: RespConnection, cursor: bytes, prefix: bytes, end_bytes: int, deadline: Deadline
) -> _Page:
    command = encode(b"SCAN", cursor, b"MATCH", prefix + b"*", b"COUNT", _SCAN_COUNT)
    reply = connection.ask(command, deadline)
    match reply:
        case [bytes(following), list(names)]:
            keys = [name for name in names if isinstance(name, bytes)]
        case _:
            raise CallError(MissCause.UNAVAILABLE, f"SCAN gave {str(reply)[:100]}")
    if not keys:
        return _Page(following, [])
    # Of what is gone meanwhile the length is 0, as it is of an empty value.
    words = [
        word
        for key in keys
        for word in (_strlen(key), _end(key, end_bytes), encode(b"EXISTS", key))
    ]
    connection.send(b"".join(words), deadline)
    replies = [connection.reply(deadline) for _ in words]
    ends = [end_of(length, end) for length, end in zip(replies[::3], replies[1::3], strict=True)]
    return _Page(
        following,
        [
            Named(key, end)
            for key, end, there in zip(keys, ends, replies[2::3], strict=True)
            if end is not None and there == 1
        ],
    )


def _strlen(key: bytes) -> bytes:
    return encode(b"STRLEN", key)


def _end(key: bytes, num_bytes: int) -> bytes:
    return encode(b"GETRANGE", key, b"%d" % -num_bytes, b"-1")
