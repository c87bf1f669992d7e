"""RESP, the protocol of Redis and Valkey, versions 2 and 3: commands to bytes, bytes to replies.

https://redis.io/docs/latest/develop/reference/protocol-spec/. What a server sends is bounded before memory is
taken for it; the value of a GET goes straight into the caller's buffers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.deadlines import CallError, Deadline
from kvkeep.tiers.stored_value import ROOM_BYTES, is_tail
from kvkeep.tiers.views import rest_of

__all__ = [
    "MAX_SKIP_BYTES",
    "ByteSource",
    "Reply",
    "ReplyReader",
    "ServerError",
    "Value",
    "encode",
    "encode_set_head",
    "encode_set_tail",
]

_CRLF = b"\r\n"
_OK = b"+OK\r\n"
# A value of another length than wanted: to read so much costs less than a new connection.
MAX_SKIP_BYTES = 1 << 16
# More than such a value with all around it.
_BUFFER_BYTES = 2 * MAX_SKIP_BYTES
# The header of a value is about ten bytes; what comes with it is copied once more.
_PEEK_BYTES = 256
# Of one reply, the values of GET aside: lists of keys and of cluster slots.
_MAX_REPLY_BYTES = 1 << 24
_MAX_DEPTH = 8
# Of a list, what one item costs in memory beside its bytes.
_ITEM_BYTES = 16


@dataclass(frozen=True, slots=True)
class ServerError:
    """An error that the server replied; `code` is its first word."""

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class _Read:
    """So many bytes that were read into these places, in order."""

    received: int
    head: bytearray
    views: Sequence[memoryview]
    rest: bytearray


@dataclass(slots=True)
class Value:
    """A value that was read, `tail` being what is behind the object; None where nothing was read of it.

    Not frozen, since one is made for each get.
    """

    length: int
    tail: bytes | bytearray | memoryview | None


# A map reads as the list of its keys and values in turn, which is how version 2 sends it.
Reply: TypeAlias = "bool | int | float | bytes | ServerError | list[Reply] | None"


class ByteSource(Protocol):
    """Where replies come from."""

    def receive_some(self, view: memoryview, deadline: Deadline) -> int:
        """Read at least one byte and at most `view` holds; how many. Raises CallError."""
        ...

    def scatter_some(self, views: Sequence[bytearray | memoryview], deadline: Deadline) -> int:
        """Read at least one byte into the views, in order; how many. Raises CallError."""
        ...

    def fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Read until all views are full. Raises CallError."""
        ...


def encode(*words: bytes) -> bytes:
    r"""A command.

    >>> encode(b"GET", b"k")
    b'*2\r\n$3\r\nGET\r\n$1\r\nk\r\n'
    """
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def encode_set_head(key: bytes, num_bytes: int, ttl_ms: int | None) -> bytes:
    """The bytes of a SET before its value; see encode_set_tail."""
    num_words = 4 if ttl_ms is None else 6
    return b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (num_words, len(key), key, num_bytes)


def encode_set_tail(ttl_ms: int | None) -> bytes:
    """The bytes after the value: a key that is there is left alone (NX), and expires after `ttl_ms`."""
    if ttl_ms is None:
        return b"\r\n$2\r\nNX\r\n"
    digits = b"%d" % ttl_ms
    return b"\r\n$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(digits), digits)


def _broken(reason: str) -> CallError:
    return CallError(MissCause.UNAVAILABLE, f"not a RESP server, or out of step: {reason}")


class ReplyReader:
    """Reads one connection's replies in order. After a CallError the connection is of no use."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0

    def reply(self, deadline: Deadline) -> Reply:
        """The next reply; what a server pushes on its own account (version 3) is passed over."""
        if self._start == self._end:
            self._start, self._end = 0, self._source.receive_some(self._view, deadline)
            if self._end == len(_OK) and self._buffer.startswith(_OK):
                # The usual answer to a put, not worth a parser.
                self._start = self._end
                return b"OK"
        while True:
            budget = [_MAX_REPLY_BYTES]
            line = self._line(deadline, _BUFFER_BYTES)
            if line[:1] != b">":
                return self._value(line, budget, deadline, depth=0)
            self._items(_number(line), budget, deadline, depth=1)

    def value_into(
        self, views: Sequence[memoryview], num_bytes: int, deadline: Deadline
    ) -> Value | ServerError | None:
        """Read a value whose object fills byte views, `num_bytes` together; None is an absent key.

        Of a value of a length that does not fit, the caller takes all bytes by `skip_bulk`, up to
        MAX_SKIP_BYTES, or drops the connection; the views may hold anything then.
        """
        if self._start == self._end:
            # The answer that is hoped for begins with bytes that are as many, so all of it can be read to
            # where it belongs at once; whatever else comes is put back and read again.
            usual_bytes = num_bytes + ROOM_BYTES
            usual_head = b"$%d\r\n" % usual_bytes
            head, rest = bytearray(len(usual_head)), bytearray(ROOM_BYTES + 2)
            received = self._source.scatter_some([head, *views, rest], deadline)
            is_all = received == len(head) + usual_bytes + 2
            if is_all and head == usual_head and rest.endswith(_CRLF):
                return Value(usual_bytes, memoryview(rest)[:-2])
            expected = _length_in(head) if received >= len(head) else None
            if expected is not None and is_tail(expected - num_bytes):
                read = _Read(received, head, views, rest)
                return self._rest_of_value(read, expected, expected - num_bytes, deadline)
            self._put_back([memoryview(head), *views, memoryview(rest)], received)
        length = self.bulk_length(deadline)
        if not isinstance(length, int):
            return length
        if not is_tail(length - num_bytes):
            return Value(length, None)
        tail = bytearray(length - num_bytes)
        self.bulk_into([*views, memoryview(tail)] if tail else views, deadline)
        return Value(length, tail)

    def bulk_length(self, deadline: Deadline) -> int | ServerError | None:
        """Begin to read a value: its length, None where there is no such key, or the server's error.

        After a length the caller takes all its bytes by `bulk_into` or `skip_bulk`, or drops the connection.
        """
        line = self._line(deadline, _PEEK_BYTES)
        kind = line[:1]
        if kind == b"$":
            length = _number(line)
            return None if length < 0 else length
        if kind == b"_":
            return None
        if kind == b"-":
            return _error(line)
        raise _broken(f"{line[:20]!r} is no value")

    def bulk_into(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Fill the byte views with the value whose length, that of all of them, was read before."""
        end = bytearray(2)
        rest = [*views, memoryview(end)]
        have = min(self._end - self._start, sum(map(len, rest)))
        if have:
            rest = self._copy_to(rest, have)
        if rest:
            self._source.fill(rest, deadline)
        if end != _CRLF:
            raise _broken("a value is longer than it says")

    def skip_bulk(self, num_bytes: int, deadline: Deadline) -> None:
        """Pass over a value of which nothing is wanted."""
        left = num_bytes
        while left > 0:
            piece = memoryview(bytearray(min(left, _BUFFER_BYTES)))
            have = min(self._end - self._start, len(piece))
            rest = self._copy_to([piece], have)
            if rest:
                self._source.fill(rest, deadline)
            left -= len(piece)
        self._expect_end(deadline)

    def _rest_of_value(
        self, read: "_Read", length: int, tail_bytes: int, deadline: Deadline
    ) -> Value:
        """End a value whose beginning was read to where it belongs."""
        rest = read.rest
        if tail_bytes + 2 > len(rest):
            rest = bytearray(tail_bytes + 2)
            rest[: len(read.rest)] = read.rest
        end = memoryview(rest)[: tail_bytes + 2]
        missing = len(read.head) + length + 2 - read.received
        if missing > 0:
            places = [memoryview(read.head), *read.views, end]
            self._source.fill(rest_of(places, read.received), deadline)
        if end[-2:] != _CRLF:
            raise _broken("a value is longer than it says")
        if missing < 0:
            # The beginning of another reply.
            self._put_back([memoryview(rest)[tail_bytes + 2 :]], -missing)
        return Value(length, end[:-2])

    def _put_back(self, views: Sequence[memoryview], num_bytes: int) -> None:
        """Buffer what was read into views, in more memory than usual if need be."""
        left = num_bytes
        if left > len(self._buffer):
            self._buffer = bytearray(left)
            self._view = memoryview(self._buffer)
        self._start = self._end = 0
        for view in views:
            size = min(left, len(view))
            self._view[self._end : self._end + size] = view[:size]
            self._end += size
            left -= size
            if not left:
                break

    def _copy_to(self, views: Sequence[memoryview], num_bytes: int) -> list[memoryview]:
        """Move buffered bytes to the views; what of these is not full yet."""
        left = num_bytes
        for view in views:
            if not left:
                break
            size = min(left, len(view))
            view[:size] = self._view[self._start : self._start + size]
            self._start += size
            left -= size
        return rest_of(views, num_bytes)

    def _line(self, deadline: Deadline, at_once: int) -> bytes:
        """The next line, without its end; reads `at_once` bytes at a time."""
        while True:
            at = self._buffer.find(_CRLF, self._start, self._end)
            if at >= 0:
                line = bytes(self._view[self._start : at])
                self._start = at + 2
                if not line:
                    raise _broken("an empty line")
                return line
            if self._start == self._end:
                self._start = self._end = 0
            elif self._end >= _BUFFER_BYTES:
                rest = bytes(self._view[self._start : self._end])
                if len(rest) >= _BUFFER_BYTES:
                    raise _broken(f"a line of more than {_BUFFER_BYTES} bytes")
                self._view[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            room = self._view[self._end : min(self._end + at_once, _BUFFER_BYTES)]
            self._end += self._source.receive_some(room, deadline)

    def _value(self, line: bytes, budget: list[int], deadline: Deadline, *, depth: int) -> Reply:
        kind, rest = line[:1], line[1:]
        match kind:
            case b"+":
                return rest
            case b"-":
                return _error(line)
            case b":":
                return _number(line)
            case b"$" | b"=" | b"!":
                value = self._bytes(_number(line), budget, deadline)
                # Version 3 has errors of any length; text is all that is wanted of them.
                return value if kind != b"!" or value is None else _error(b"-" + value)
            case b"*" | b"~":
                return self._items(_number(line), budget, deadline, depth=depth + 1)
            case b"%":
                return self._items(2 * _number(line), budget, deadline, depth=depth + 1)
            case _:
                return _scalar(line)

    def _items(
        self, count: int, budget: list[int], deadline: Deadline, *, depth: int
    ) -> list[Reply] | None:
        if count < 0:
            return None
        _spend(budget, _ITEM_BYTES * count)
        if depth > _MAX_DEPTH:
            raise _broken(f"lists nested more than {_MAX_DEPTH} deep")
        return [
            self._value(self._line(deadline, _BUFFER_BYTES), budget, deadline, depth=depth)
            for _ in range(count)
        ]

    def _bytes(self, length: int, budget: list[int], deadline: Deadline) -> bytes | None:
        if length < 0:
            return None
        _spend(budget, length)
        value = bytearray(length)
        view = memoryview(value)
        rest = self._copy_to([view], min(length, self._end - self._start))
        if rest:
            self._source.fill(rest, deadline)
        self._expect_end(deadline)
        return bytes(value)

    def _expect_end(self, deadline: Deadline) -> None:
        end = bytearray(2)
        rest = self._copy_to([memoryview(end)], min(2, self._end - self._start))
        if rest:
            self._source.fill(rest, deadline)
        if end != _CRLF:
            raise _broken("a value is longer than it says")


def _spend(budget: list[int], num_bytes: int) -> None:
    budget[0] -= num_bytes
    if budget[0] < 0:
        raise _broken(f"a reply of more than {_MAX_REPLY_BYTES} bytes")


def _length_in(head: bytearray) -> int | None:
    """The length that the head of a value says, if that is what it is."""
    digits = head[1:-2]
    if head[:1] != b"$" or head[-2:] != _CRLF or not digits.isdigit():
        return None
    return int(digits)


def _number(line: bytes) -> int:
    digits = line[1:]
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:
        raise _broken(f"{line[:20]!r} has no number")
    return int(digits)


def _error(line: bytes) -> ServerError:
    text = line[1:].decode("utf-8", "replace")
    return ServerError(text.partition(" ")[0], text)


def _scalar(line: bytes) -> Reply:
    match line[:1]:
        case b"_":
            return None
        case b"#":
            return line == b"#t"
        case b"," | b"(":
            try:
                return float(line[1:])
            except ValueError:
                raise _broken(f"{line[:20]!r} has no number") from None
        case _:
            raise _broken(f"{line[:20]!r}")
