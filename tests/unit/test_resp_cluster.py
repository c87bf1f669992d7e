from threading import Barrier, Thread
from typing import Self

import pytest

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import CallError, Deadline
from kvkeep.tiers.resp_cluster import NUM_SLOTS, ClusterRouter, slot_of
from kvkeep.tiers.resp_protocol import Reply, ServerError
from kvkeep.tiers.resp_stream import Address, TcpAddress


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class FakeConnection:
    """Answers CLUSTER SLOTS as its node is told to."""

    def __init__(self, node: "FakeNode") -> None:
        self.node = node

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, command: bytes, deadline: Deadline) -> Reply:
        assert b"SLOTS" in command
        self.node.num_asked += 1
        if isinstance(self.node.table, CallError):
            raise self.node.table
        return self.node.table


class FakeNode:
    """Stands for a RespNode: what a router needs of one."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.breaker = Breaker(str(address))
        self.table: Reply | CallError = None
        self.num_asked = 0
        self.is_closed = False

    def lease(self, deadline: Deadline) -> FakeConnection:
        return FakeConnection(self)

    def close(self) -> None:
        self.is_closed = True


class Cluster:
    """A router over fake nodes, by port."""

    def __init__(self, *seed_ports: int) -> None:
        self.clock = Clock()
        self.port_to_node: dict[int, FakeNode] = {}
        seeds = [TcpAddress("127.0.0.1", port) for port in seed_ports]
        self.router = ClusterRouter(seeds, self._make, clock=self.clock)  # type: ignore[arg-type]

    def _make(self, address: Address) -> FakeNode:
        assert isinstance(address, TcpAddress)
        self.port_to_node[address.port] = FakeNode(address)
        return self.port_to_node[address.port]

    def port_of(self, key: bytes) -> int:
        address = self.router.node_of(key, Deadline(300)).address
        assert isinstance(address, TcpAddress)
        return address.port


HALF = NUM_SLOTS // 2
TWO: list[Reply] = [
    [0, HALF - 1, [b"127.0.0.1", 1, b"id1", []]],
    [HALF, NUM_SLOTS - 1, [b"", 2, b"id2"], [b"127.0.0.1", 9, b"its replica"]],
]
LOW = next(key for key in (b"%d" % n for n in range(100)) if slot_of(key) < HALF)
HIGH = next(key for key in (b"%d" % n for n in range(100)) if slot_of(key) >= HALF)


@pytest.fixture
def cluster() -> Cluster:
    """Two masters, which are the seeds too."""
    cluster = Cluster(1, 2)
    for node in cluster.port_to_node.values():
        node.table = TWO
    return cluster


def test_slots_are_those_of_the_specification() -> None:
    """Known values of CRC16, as `CLUSTER KEYSLOT` gives them."""
    assert [slot_of(key) for key in (b"", b"foo", b"123456789")] == [0, 12182, 12739]


def test_each_key_has_its_master(cluster: Cluster) -> None:
    """Hosts that are left out are those of the node that was asked; replicas hold no keys for us."""
    assert (cluster.port_of(LOW), cluster.port_of(HIGH)) == (1, 2)
    assert set(cluster.port_to_node) == {1, 2}
    assert len(cluster.router.nodes(Deadline(300))) == 2


def test_a_redirect_is_remembered(cluster: Cluster) -> None:
    """MOVED changes the slot at once, ASK changes nothing."""
    cluster.port_of(LOW)
    node = cluster.router.node_of(LOW, Deadline(300))
    slot = slot_of(LOW)

    asked = cluster.router.follow(ServerError("ASK", f"ASK {slot} 127.0.0.1:2"), node)
    assert asked.is_asking
    assert cluster.port_of(LOW) == 1
    moved = cluster.router.follow(ServerError("MOVED", f"MOVED {slot} :3"), node)

    assert not moved.is_asking
    assert moved.node.address == TcpAddress("127.0.0.1", 3)
    assert cluster.port_of(LOW) == 3


def test_the_table_is_asked_for_at_most_once_a_second(cluster: Cluster) -> None:
    """A hundred faults are one question; without any nobody asks."""
    for _ in range(100):
        cluster.router.note_fault()
        cluster.port_of(LOW)
    assert cluster.port_to_node[1].num_asked == 1

    cluster.clock.now_s = 1.1
    for _ in range(100):
        cluster.router.note_fault()
        cluster.port_of(LOW)
    assert cluster.port_to_node[1].num_asked == 2

    cluster.clock.now_s = 100.0
    cluster.port_of(LOW)
    cluster.clock.now_s = 200.0
    cluster.port_of(LOW)
    assert cluster.port_to_node[1].num_asked == 3


def test_the_next_node_is_asked_when_one_does_not_answer(cluster: Cluster) -> None:
    """Those whose breaker is open come last; all that fail make all keys absent for a second."""
    first, second = cluster.port_to_node[1], cluster.port_to_node[2]
    first.table = CallError(MissCause.LATE, "no answer")
    assert cluster.port_of(LOW) == 1
    assert (first.num_asked, second.num_asked) == (1, 1)

    first.breaker.trip("no answer")
    cluster.clock.now_s = 2.0
    cluster.router.note_fault()
    cluster.port_of(LOW)

    assert (first.num_asked, second.num_asked) == (1, 2)


def test_without_a_table_every_key_is_a_fault(cluster: Cluster) -> None:
    """It says why, asks again after a second, and then all is well."""
    for node in cluster.port_to_node.values():
        node.table = ServerError("LOADING", "LOADING wait")
    for _ in range(10):
        with pytest.raises(CallError, match="LOADING wait"):
            cluster.port_of(LOW)
    assert cluster.port_to_node[1].num_asked == 1

    cluster.port_to_node[2].table = TWO
    cluster.clock.now_s = 1.1

    assert cluster.port_of(LOW) == 1


def test_slots_without_a_node_are_a_fault_for_their_keys_only(cluster: Cluster) -> None:
    """Half of the slots are nobody's."""
    cluster.port_to_node[1].table = TWO[:1]

    assert cluster.port_of(LOW) == 1
    with pytest.raises(CallError, match="no node has slot"):
        cluster.port_of(HIGH)


def test_nodes_that_left_are_closed(cluster: Cluster) -> None:
    """Seeds stay, since they are what the address says."""
    cluster.port_to_node[1].table = [[0, NUM_SLOTS - 1, [b"127.0.0.1", 3]]]
    assert cluster.port_of(LOW) == 3
    cluster.port_to_node[1].table = TWO
    cluster.router.note_fault()
    cluster.clock.now_s = 1.1

    assert cluster.port_of(LOW) == 1
    assert cluster.port_to_node[3].is_closed
    assert not cluster.port_to_node[2].is_closed


@pytest.mark.parametrize(
    "table",
    [
        None,
        [],
        b"OK",
        [[0, 1]],
        [[0, NUM_SLOTS, [b"a", 1]]],
        [[-1, 5, [b"a", 1]]],
        [[5, 4, [b"a", 1]]],
        [[0, 5, [1, 1]]],
        [[b"0", 5, [b"a", 1]]],
        [[0, 5, [b"?", 1]]],
    ],
)
def test_a_table_of_nonsense_is_a_fault(table: Reply) -> None:
    """Whatever a node answers, nothing else is raised."""
    cluster = Cluster(1)
    cluster.port_to_node[1].table = table

    with pytest.raises(CallError, match="who has what"):
        cluster.port_of(LOW)


@pytest.mark.parametrize(
    "text", ["MOVED", "MOVED 1", "MOVED x 127.0.0.1:1", "MOVED 1 host", "MOVED 1 ?:6379"]
)
def test_a_redirect_to_nowhere_is_a_fault(cluster: Cluster, text: str) -> None:
    """It cannot be followed, and the message shows it."""
    node = cluster.router.node_of(LOW, Deadline(300))

    with pytest.raises(CallError, match="redirects nowhere"):
        cluster.router.follow(ServerError("MOVED", text), node)


def test_one_thread_asks_for_all(cluster: Cluster) -> None:
    """Many that start together wait for the first table, and ask once."""
    start, ports = Barrier(8), []

    def ask() -> None:
        start.wait()
        ports.append(cluster.port_of(HIGH))

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert ports == [2] * 8
    assert cluster.port_to_node[1].num_asked == 1
