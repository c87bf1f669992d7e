"""What RespTier needs of a client of RESP servers, whoever wrote it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvkeep.tiers.base import Got, Miss, PutOutcome
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import Deadline

__all__ = ["Deleted", "Named", "RespTransport", "SetRequest", "SetResult"]


@dataclass(slots=True)
class SetRequest:
    """A value to store under `key`, unless something is there: `parts`, together `num_bytes` long."""

    key: bytes
    parts: Iterable[memoryview]
    num_bytes: int
    ttl_ms: int | None

    @property
    def is_repeatable(self) -> bool:
        """Whether the parts can be gone through again, and are all there at once."""
        return isinstance(self.parts, list | tuple)


@dataclass(frozen=True, slots=True)
class SetResult:
    """What became of a SET; `reason` says why it failed or was refused."""

    outcome: PutOutcome
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Deleted:
    """How many objects there were, their bytes, and of how many keys nothing is known."""

    num_objects: int
    num_bytes: int
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Named:
    """An object on a server."""

    name: bytes
    num_bytes: int


class RespTransport(Protocol):
    """A client of RESP servers. No method raises for a fault of these, `ping` and `scan` aside.

    Every call ends at its deadline. Any thread may call any method. Keys have no braces in them.
    """

    @property
    def breakers(self) -> Sequence[Breaker]:
        """The circuit breakers of all servers."""
        ...

    def exists_many(self, keys: Sequence[bytes], deadline: Deadline) -> list[bool]:
        """Whether each key is there, in one round trip; False where its server does not answer."""
        ...

    def get_into(
        self, key: bytes, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Got | Miss:
        """Fill byte views, together `num_bytes` long, with a value of that length."""
        ...

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        """Store a value unless its key is there. Raises what going through its parts raises."""
        ...

    def delete_many(self, keys: Sequence[bytes], deadline: Deadline) -> Deleted:
        """Delete keys, and say what there was of them."""
        ...

    def touch_many(self, keys: Sequence[bytes], ttl_ms: int | None, deadline: Deadline) -> None:
        """Count a use of the keys, which live `ttl_ms` from now on, if that is given."""
        ...

    def scan(self, prefix: bytes, timeout_s: float) -> Iterator[Named]:
        """All keys that begin so, each step within `timeout_s`.

        A key may come twice. Raises CallError, after all others, where some server does not answer.
        """
        ...

    def ping(self, deadline: Deadline) -> None:
        """Ask for a sign of life, and leave the servers alone for a while when there is none.

        Raises CallError then, SettingError where the login is refused.
        """
        ...

    def close(self) -> None:
        """Close all connections; calls that run may end in faults."""
        ...
