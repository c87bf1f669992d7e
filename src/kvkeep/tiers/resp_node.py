"""One RESP server as a tier calls it: a bounded pool of connections behind a circuit breaker."""

from collections import deque
from types import TracebackType

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.breaker import Breaker, BreakerRules, Permit
from kvkeep.tiers.deadlines import CallError, Deadline, Turns
from kvkeep.tiers.resp_connection import Login, RespConnection
from kvkeep.tiers.resp_stream import Address

__all__ = ["NodeLease", "RespNode"]


class NodeLease:
    """A connection held for one call; as a context it goes back, or is closed after any exception.

    A CallError counts against the server, every other exception says nothing about it.
    """

    __slots__ = ("_is_ended", "_node", "_permit", "connection")

    def __init__(self, node: "RespNode", permit: Permit, connection: RespConnection) -> None:
        self._node = node
        self._permit = permit
        self.connection = connection
        self._is_ended = False

    def end(self, error: BaseException | None) -> None:
        """Give the connection back after the call, or close it after `error`; once."""
        if self._is_ended:
            return
        self._is_ended = True
        if error is None:
            self._permit.succeed()
        elif isinstance(error, CallError):
            self._permit.fail(str(error))
        else:
            self._permit.abandon()
        self._node.take_back(self.connection, is_usable=error is None)

    def __enter__(self) -> RespConnection:
        return self.connection

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(error)


class RespNode:
    """At most `num_connections` calls at once; others wait for one of these to end."""

    def __init__(
        self,
        address: Address,
        login: Login,
        *,
        num_connections: int,
        name: str,
        rules: BreakerRules | None = None,
    ) -> None:
        self.address = address
        self.breaker = Breaker(f"{name} ({address})", rules)
        self._login = login
        self._num_connections = num_connections
        self._turns = Turns(num_connections)
        # The one used last comes first, so that the others are seen to be idle.
        self._idle: deque[RespConnection] = deque()
        self._is_open = True

    def lease(self, deadline: Deadline) -> NodeLease:
        """A connection for one call; raises CallError when there is none to be had."""
        permit = self.breaker.admit()
        if permit is None:
            raise CallError(
                MissCause.UNAVAILABLE, f"{self.address} is left alone: {self.breaker.reason}"
            )
        if not self._turns.take_now():
            self._wait_for_turn(permit, deadline)
        try:
            return NodeLease(self, permit, self._connection(deadline))
        except CallError as error:
            permit.fail(str(error))
            self._turns.give_back()
            raise
        except BaseException:
            permit.abandon()
            self._turns.give_back()
            raise

    def take_back(self, connection: RespConnection, *, is_usable: bool) -> None:
        """Called by leases."""
        if is_usable and connection.is_usable and self._is_open:
            self._idle.append(connection)
        else:
            connection.close()
        self._turns.give_back()
        if not self._is_open:
            self._close_idle()

    def close(self) -> None:
        """Close idle connections, and those in use as soon as their calls end."""
        self._is_open = False
        self._close_idle()

    def _wait_for_turn(self, permit: Permit, deadline: Deadline) -> None:
        try:
            has_turn = self._turns.take(deadline.left_s())
        except BaseException:
            permit.abandon()
            raise
        if not has_turn:
            # Waiting for each other says nothing about the server.
            permit.abandon()
            raise CallError(
                MissCause.LATE,
                f"all {self._num_connections} connections to {self.address} were busy for "
                f"{deadline.timeout_s:g} s",
            )

    def _connection(self, deadline: Deadline) -> RespConnection:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if not connection.is_stale():
                return connection
            connection.close()
        if not self._is_open:
            raise CallError(MissCause.UNAVAILABLE, "closed")
        return RespConnection.open(self.address, self._login, deadline)

    def _close_idle(self) -> None:
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return
