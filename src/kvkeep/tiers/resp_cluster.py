"""Which node of a Redis or Valkey cluster has a key, learned from the nodes and from their redirects.

https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/. Only masters are asked.
"""

from binascii import crc_hqx
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from time import monotonic

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.breaker import BreakerState
from kvkeep.tiers.deadlines import CallError, Deadline, SettingError
from kvkeep.tiers.resp_connection import unavailable
from kvkeep.tiers.resp_node import RespNode
from kvkeep.tiers.resp_protocol import Reply, ServerError, encode
from kvkeep.tiers.resp_router import Redirect
from kvkeep.tiers.resp_stream import Address, TcpAddress

__all__ = ["NUM_SLOTS", "ClusterRouter", "slot_of"]

NUM_SLOTS = 16384
_REFRESH_PAUSE_S = 1.0


def slot_of(key: bytes) -> int:
    """The slot of a key, which has no braces in it: these would say that only a part counts.

    >>> slot_of(b"123456789")  # the test value of the specification: 0x31C3
    12739
    """
    return crc_hqx(key, 0) % NUM_SLOTS


@dataclass(frozen=True, slots=True)
class _SlotRange:
    first: int
    last: int
    address: Address


class ClusterRouter:
    """A table of slots, asked for again after redirects and faults, at most once a second.

    While a node is down, and no other has taken its slots over, its keys have no server.
    """

    def __init__(
        self,
        seeds: Sequence[Address],
        make_node: Callable[[Address], RespNode],
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._seeds = tuple(seeds)
        self._make_node = make_node
        self._clock = clock
        self._lock = Lock()
        self._refreshing = Lock()
        self._address_to_node: dict[Address, RespNode] = {}
        self._slots: list[RespNode | None] = []
        self._wants_refresh = True
        self._refresh_at_s = clock()
        self._reason = "no node of the cluster was asked yet"
        self._is_open = True
        for address in self._seeds:
            self._node_at(address)

    @property
    def known(self) -> Sequence[RespNode]:
        """Nodes of the table and those of the address."""
        with self._lock:
            return list(self._address_to_node.values())

    def node_of(self, key: bytes, deadline: Deadline) -> RespNode:
        """The master of the key's slot; raises CallError where none is known."""
        self._refresh_if_due(deadline)
        slot = slot_of(key)
        node = self._slots[slot] if self._slots else None
        if node is None:
            reason = f"no node has slot {slot}" if self._slots else self._reason
            raise CallError(MissCause.UNAVAILABLE, reason)
        return node

    def is_redirect(self, error: ServerError) -> bool:
        """Whether the key is elsewhere, for good (MOVED) or for this time (ASK)."""
        return error.code in ("MOVED", "ASK")

    def follow(self, error: ServerError, node: RespNode) -> Redirect:
        """Where "MOVED 3999 10.0.0.1:6381" leads; without a host it is that of `node`."""
        words = error.text.split(" ")
        host, _, port = words[-1].rpartition(":")
        if len(words) != 3 or not words[1].isdecimal() or not port.isdecimal() or host == "?":
            raise CallError(MissCause.UNAVAILABLE, f"{node.address} redirects nowhere: {error}")
        target = self._node_at(_address(host, int(port), node.address))
        if error.code == "MOVED":
            with self._lock:
                if self._slots and int(words[1]) < NUM_SLOTS:
                    self._slots[int(words[1])] = target
                # Slots seldom move alone.
                self._wants_refresh = True
        return Redirect(target, is_asking=error.code == "ASK")

    def note_fault(self) -> None:
        """Another node may have taken over."""
        self._wants_refresh = True

    def nodes(self, deadline: Deadline) -> Sequence[RespNode]:
        """All masters with slots."""
        self._refresh_if_due(deadline)
        found = {id(node): node for node in self._slots if node is not None}
        if not found:
            raise CallError(MissCause.UNAVAILABLE, self._reason)
        return list(found.values())

    def close(self) -> None:
        """Close all nodes' connections."""
        self._is_open = False
        for node in self.known:
            node.close()

    def _node_at(self, address: Address) -> RespNode:
        with self._lock:
            node = self._address_to_node.get(address)
            if node is None:
                node = self._address_to_node[address] = self._make_node(address)
                if not self._is_open:
                    node.close()
            return node

    def _refresh_if_due(self, deadline: Deadline) -> None:
        if not self._is_due():
            return
        # One asks; the others go on with the table there is, or wait for the first one.
        if self._slots:
            has_turn = self._refreshing.acquire(blocking=False)
        else:
            has_turn = self._refreshing.acquire(timeout=deadline.left_s())
        if not has_turn:
            return
        try:
            if self._is_due():
                self._refresh(deadline)
        finally:
            self._refresh_at_s = self._clock() + _REFRESH_PAUSE_S
            self._refreshing.release()

    def _is_due(self) -> bool:
        return self._wants_refresh and self._clock() >= self._refresh_at_s

    def _refresh(self, deadline: Deadline) -> None:
        """Take the table of the first node that answers. Raises SettingError where the login is refused."""
        self._wants_refresh = False
        # Those that are known to be down come last.
        candidates = sorted(
            self.known, key=lambda node: node.breaker.state is not BreakerState.CLOSED
        )
        for node in candidates:
            try:
                # Half of the time for each, so that one that hangs leaves some to the next.
                self._install(_ask_for_slots(node, deadline.at_most(deadline.left_s() / 2)))
            except SettingError:
                self._wants_refresh = True
                raise
            except CallError as error:
                self._reason = f"no node of the cluster says who has what: {error}"
            else:
                return
        self._wants_refresh = True

    def _install(self, ranges: list[_SlotRange]) -> None:
        slots: list[RespNode | None] = [None] * NUM_SLOTS
        for one in ranges:
            node = self._node_at(one.address)
            slots[one.first : one.last + 1] = [node] * (one.last + 1 - one.first)
        self._slots = slots
        wanted = {*self._seeds, *(one.address for one in ranges)}
        with self._lock:
            gone = [address for address in self._address_to_node if address not in wanted]
            nodes = [self._address_to_node.pop(address) for address in gone]
        for node in nodes:
            node.close()


def _ask_for_slots(node: RespNode, deadline: Deadline) -> list[_SlotRange]:
    with node.lease(deadline) as connection:
        reply = connection.ask(encode(b"CLUSTER", b"SLOTS"), deadline)
        if isinstance(reply, ServerError):
            fault = unavailable(reply)
            if fault is not None:
                raise fault
            if "cluster support disabled" in reply.text:
                raise SettingError(f"{node.address} is no cluster; write redis:// without +cluster")
            raise CallError(MissCause.UNAVAILABLE, f"CLUSTER SLOTS: {reply}")
        ranges = _parse_slots(reply, node.address)
    if not ranges:
        raise CallError(MissCause.UNAVAILABLE, f"{node.address} knows no slots")
    return ranges


def _parse_slots(reply: Reply, asked: Address) -> list[_SlotRange]:
    ranges = []
    for entry in reply if isinstance(reply, list) else [reply]:
        match entry:
            case [int(first), int(last), [host, int(port), *_], *_] if (
                0 <= first <= last < NUM_SLOTS and isinstance(host, bytes | None)
            ):
                name = "" if host is None else host.decode("utf-8", "replace")
                if name != "?":
                    ranges.append(_SlotRange(first, last, _address(name, port, asked)))
            case _:
                raise CallError(
                    MissCause.UNAVAILABLE, f"{asked}: CLUSTER SLOTS gave {str(entry)[:100]}"
                )
    return ranges


def _address(host: str, port: int, asked: Address) -> TcpAddress:
    # A node that does not know its own name means the one that it was asked by.
    if not host:
        assert isinstance(asked, TcpAddress)
        host = asked.host
    return TcpAddress(host, port)
