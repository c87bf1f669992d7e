from collections.abc import Sequence

import pytest

from kvkeep.tiers.base import Miss, MissCause, PutOutcome
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline
from kvkeep.tiers.resp_connection import Login
from kvkeep.tiers.resp_node import RespNode
from kvkeep.tiers.resp_protocol import ServerError
from kvkeep.tiers.resp_router import Redirect
from kvkeep.tiers.resp_sockets import SocketTransport
from kvkeep.tiers.resp_stream import TcpAddress
from kvkeep.tiers.resp_transport import Deleted, Patch, SetRequest
from tests.servers import free_port


class Router:
    """Nobody listens where it sends everybody."""

    def __init__(self, node: RespNode) -> None:
        self.known: Sequence[RespNode] = (node,)
        self.num_faults = 0

    def node_of(self, key: bytes, deadline: Deadline) -> RespNode:
        return self.known[0]

    def is_redirect(self, error: ServerError) -> bool:
        return False

    def follow(self, error: ServerError, node: RespNode) -> Redirect:
        raise AssertionError(error)

    def note_fault(self) -> None:
        self.num_faults += 1

    def nodes(self, deadline: Deadline) -> Sequence[RespNode]:
        return self.known

    def close(self) -> None:
        self.known[0].close()


def test_every_kind_of_call_tells_the_router_of_a_fault() -> None:
    """None of them raises, and each makes a cluster look for who has taken over."""
    login = Login(
        user=None,
        password=None,
        database=0,
        protocol=3,
        client_name="test",
        tls=None,
        names=BoundedCalls(1, name="test"),
    )
    address = TcpAddress("127.0.0.1", free_port())
    router = Router(RespNode(address, login, num_connections=1, name="test"))
    transport = SocketTransport(router, login)
    request = SetRequest(b"k", [memoryview(b"abc")], 3, None)

    assert transport.exists_many([b"a", b"b"], Deadline(9)) == [False, False]
    assert router.num_faults == 1
    found = transport.get_into(b"k", [memoryview(bytearray(3))], 3, Deadline(9))
    assert isinstance(found, Miss)
    assert found.cause is MissCause.UNAVAILABLE
    assert router.num_faults == 2
    assert transport.set(request, Deadline(9)).outcome is PutOutcome.FAILED
    assert router.num_faults == 3
    assert transport.delete_many([b"k"], Deadline(9)) == Deleted(0, 0, num_failed=1)
    assert router.num_faults == 4
    transport.touch_many([b"k"], None, Deadline(9))
    assert router.num_faults == 5
    with pytest.raises(CallError):
        list(transport.scan(b"", 9.0, end_bytes=24))
    assert router.num_faults == 6
    assert transport.ends([b"a", b"b"], 24, Deadline(9)) == [None, None]
    assert router.num_faults == 7
    (patched,) = transport.patch_many([Patch(b"k", 9, 3, b"tail")], Deadline(9))
    assert patched.outcome is PutOutcome.FAILED
    assert router.num_faults == 8
    transport.close()
