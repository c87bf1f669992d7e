"""Which server has a key; here the simple answer, in resp_cluster the other one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvkeep.tiers.deadlines import Deadline
from kvkeep.tiers.resp_node import RespNode
from kvkeep.tiers.resp_protocol import ServerError

__all__ = ["Redirect", "Router", "SingleRouter"]


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where to ask; with `is_asking` for a key that is being moved there now."""

    node: RespNode
    is_asking: bool


class Router(Protocol):
    """Knows the servers and what each has."""

    @property
    def known(self) -> Sequence[RespNode]:
        """All servers known now."""
        ...

    def node_of(self, key: bytes, deadline: Deadline) -> RespNode:
        """The server that should have the key; raises CallError where there is none."""
        ...

    def is_redirect(self, error: ServerError) -> bool:
        """Whether `follow` leads somewhere."""
        ...

    def follow(self, error: ServerError, node: RespNode) -> Redirect:
        """Where an error of `node` sends us, which is remembered. Raises CallError if that says nothing."""
        ...

    def note_fault(self) -> None:
        """Learn that a server did not answer."""
        ...

    def nodes(self, deadline: Deadline) -> Sequence[RespNode]:
        """All servers that hold keys; raises CallError where that cannot be found out."""
        ...

    def close(self) -> None:
        """Close all servers' connections."""
        ...


class SingleRouter:
    """One server has all keys."""

    def __init__(self, node: RespNode) -> None:
        self.known: Sequence[RespNode] = (node,)

    def node_of(self, key: bytes, deadline: Deadline) -> RespNode:
        """The server."""
        return self.known[0]

    def is_redirect(self, error: ServerError) -> bool:
        """Never: a redirect is a wrong setting here."""
        return False

    def follow(self, error: ServerError, node: RespNode) -> Redirect:
        """Not to be called."""
        raise AssertionError(error)

    def note_fault(self) -> None:
        """Its breaker knows."""

    def nodes(self, deadline: Deadline) -> Sequence[RespNode]:
        """The server."""
        return self.known

    def close(self) -> None:
        """Close its connections."""
        self.known[0].close()
