"""What RespTier needs of a client of RESP servers, whoever wrote it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvkeep.tiers.base import Got, Miss, PutOutcome
from kvkeep.tiers.breaker import Breaker
from kvkeep.tiers.deadlines import Deadline
from kvkeep.tiers.stored_value import End

__all__ = [
    "Deleted",
    "Named",
    "Patch",
    "RespTransport",
    "SetRequest",
    "SetResult",
    "end_of",
    "patch_result",
    "patch_words",
]

# The one thing that servers have no command for: to write into a value that is there, and make none. Of a key
# that is gone the length is 0. Arguments: the length, an offset, what is written there, the end as it was.
_PATCH_SCRIPT = b"""
local length = redis.call('STRLEN', KEYS[1])
if length == 0 or length ~= tonumber(ARGV[1]) then return 0 end
if #ARGV[4] > 0 and redis.call('GETRANGE', KEYS[1], -#ARGV[4], -1) ~= ARGV[4] then return 0 end
redis.call('SETRANGE', KEYS[1], ARGV[2], ARGV[3])
return 1
"""


@dataclass(slots=True)
class SetRequest:
    """A value to store under `key`, unless something is there.

    It is `parts`, together `num_bytes` long, and `tail` behind them.
    """

    key: bytes
    parts: Iterable[memoryview]
    num_bytes: int
    ttl_ms: int | None
    tail: bytes = b""

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
    """A value on a server."""

    name: bytes
    end: End


@dataclass(frozen=True, slots=True)
class Patch:
    """What is to be written into a value of `length` bytes that ends with `end`, from `offset` on."""

    key: bytes
    length: int
    offset: int
    content: bytes
    end: bytes = b""


def end_of(length: object, end: object) -> End | None:
    """What STRLEN and GETRANGE say of a value, None where they say something else."""
    if not isinstance(length, int) or not isinstance(end, bytes):
        return None
    return End(length, end)


def patch_words(patch: Patch) -> list[bytes]:
    """The command that does it."""
    places = (b"%d" % patch.length, b"%d" % patch.offset)
    return [b"EVAL", _PATCH_SCRIPT, b"1", patch.key, *places, patch.content, patch.end]


def patch_result(answer: object) -> SetResult:
    """What the answer to that command means."""
    if answer == 1:
        return SetResult(PutOutcome.STORED)
    return SetResult(PutOutcome.REFUSED if answer == 0 else PutOutcome.FAILED, str(answer))


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
        """Fill byte views, together `num_bytes` long, with an object of that length; see `stored_value`."""
        ...

    def set(self, request: SetRequest, deadline: Deadline) -> SetResult:
        """Store a value unless its key is there. Raises what going through its parts raises."""
        ...

    def ends(self, keys: Sequence[bytes], num_bytes: int, deadline: Deadline) -> list[End | None]:
        """The last `num_bytes` of each value; None where it is absent, or its server does not answer."""
        ...

    def patch_many(self, patches: Sequence[Patch], deadline: Deadline) -> list[SetResult]:
        """Write into each value that is there and has the length and the end that are said; makes none.

        STORED; REFUSED where it has another length or end, or is gone; FAILED.
        """
        ...

    def delete_many(self, keys: Sequence[bytes], deadline: Deadline) -> Deleted:
        """Delete keys, and say what there was of them: the lengths of their values."""
        ...

    def touch_many(self, keys: Sequence[bytes], ttl_ms: int | None, deadline: Deadline) -> None:
        """Count a use of the keys, which live `ttl_ms` from now on, if that is given."""
        ...

    def scan(self, prefix: bytes, timeout_s: float, *, end_bytes: int) -> Iterator[Named]:
        """All keys that begin so, with the last `end_bytes` of their values, each step within `timeout_s`.

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
