from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.deadlines import CallError, Deadline
from kvkeep.tiers.resp_protocol import (
    MAX_SKIP_BYTES,
    Reply,
    ReplyReader,
    ServerError,
    Value,
    encode,
    encode_set_head,
    encode_set_tail,
)
from kvkeep.tiers.stored_value import ROOM_BYTES, is_tail

SOON = Deadline(300.0)


class Wire:
    """Bytes that arrive in pieces of at most `piece` bytes, and an end."""

    def __init__(self, content: bytes, piece: int = 1 << 20) -> None:
        self.rest = memoryview(content)
        self.piece = piece

    def receive_some(self, view: memoryview, deadline: Deadline) -> int:
        size = min(len(view), len(self.rest), self.piece)
        if not size:
            raise CallError(MissCause.UNAVAILABLE, "the wire is at its end")
        view[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size

    def scatter_some(self, views: Sequence[bytearray | memoryview], deadline: Deadline) -> int:
        num_received = 0
        for view in [memoryview(one) for one in views]:
            # A piece may end in the middle of a view, and then nothing goes into the next.
            if view and num_received < self.piece and self.rest:
                size = min(len(view), self.piece - num_received)
                num_received += self.receive_some(view[:size], deadline)
        return num_received or self.receive_some(memoryview(views[0]), deadline)

    def fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        for view in views:
            done = 0
            while done < len(view):
                done += self.receive_some(view[done:], deadline)


def to_wire(reply: Reply) -> bytes:
    """The bytes of a reply in version 3."""
    match reply:
        case None:
            return b"_\r\n"
        case bool():
            return b"#t\r\n" if reply else b"#f\r\n"
        case int():
            return b":%d\r\n" % reply
        case float():
            return b",%r\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case ServerError():
            return b"-" + reply.text.encode() + b"\r\n"
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(to_wire, reply))


texts = st.text("ABCDEFGHIJ klmno'", min_size=1, max_size=30)
replies = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=300)
    | st.floats(allow_nan=False)
    | texts.map(lambda text: ServerError(text.partition(" ")[0], text)),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(replies, min_size=1, max_size=5), st.integers(1, 70))
def test_replies_are_read_however_they_arrive(expected: list[Reply], piece: int) -> None:
    """One after another, in pieces of any size, each reply is what was sent."""
    reader = ReplyReader(Wire(b"".join(map(to_wire, expected)), piece))

    found = [reader.reply(SOON) for _ in expected]

    assert found == expected


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"$-1\r\n", None),
        (b"*-1\r\n", None),
        (b"+OK\r\n", b"OK"),
        (b"%1\r\n$1\r\na\r\n:1\r\n", [b"a", 1]),
        (b"~2\r\n:1\r\n:2\r\n", [1, 2]),
        (b"=6\r\ntxt:ab\r\n", b"txt:ab"),
        (b"!9\r\nERR a bad\r\n", ServerError("ERR", "ERR a bad")),
        (b"(12345678901234567890\r\n", 12345678901234567890.0),
        (b">2\r\n+invalidate\r\n*0\r\n:7\r\n", 7),
    ],
)
def test_forms_of_both_versions(sent: bytes, expected: Reply) -> None:
    """Absent values of version 2, maps, sets, texts and errors of version 3; pushes are passed over."""
    assert ReplyReader(Wire(sent)).reply(SOON) == expected


@given(
    st.binary(max_size=5000),
    st.sampled_from([0, 24, 100, ROOM_BYTES - 1, ROOM_BYTES, ROOM_BYTES + 1, 4000]),
    st.integers(1, 6000),
    st.lists(st.integers(0, 5000), max_size=4),
)
def test_a_value_lands_in_the_buffers(
    content: bytes, tail_bytes: int, piece: int, cuts: list[int]
) -> None:
    """Cut anywhere, arriving in any pieces, with anything behind it; the reply that follows stays whole."""
    target, tail = bytearray(len(content)), bytes(range(1, 251)) * 16
    bounds = sorted([0, *(min(cut, len(content)) for cut in cuts), len(content)])
    views = [memoryview(target)[begin:end] for begin, end in pairwise(bounds)]
    value = content + tail[:tail_bytes]
    reader = ReplyReader(Wire(to_wire(value) * 2 + b":5\r\n", piece))

    for _ in range(2):
        found = reader.value_into(views, len(content), SOON)
        assert isinstance(found, Value)
        assert found.tail is not None
        assert (found.length, bytes(found.tail)) == (len(value), tail[:tail_bytes])
        assert target == content
        target[:] = bytes(len(content))

    assert reader.reply(SOON) == 5


@given(st.integers(0, 300_000), st.integers(0, 300_000), st.integers(1, 400_000), st.integers(0, 9))
def test_a_value_of_another_length_is_told_by_its_length(
    num_there: int, num_wanted: int, piece: int, num_pushed: int
) -> None:
    """However much of it has come, and whatever was pushed before; short ones can be passed over."""
    content, buffer = bytes(num_there), memoryview(bytearray(num_wanted))
    pushes = b">1\r\n+x\r\n" * num_pushed
    reader = ReplyReader(Wire(pushes + b":1\r\n" + to_wire(content) + b":5\r\n", piece))
    assert reader.reply(SOON) == 1

    value = reader.value_into([buffer], num_wanted, SOON)

    assert isinstance(value, Value)
    assert value.length == num_there
    assert (value.tail is not None) == is_tail(num_there - num_wanted)
    if value.tail is None and num_there <= MAX_SKIP_BYTES:
        reader.skip_bulk(num_there, SOON)
    if value.tail is not None or num_there <= MAX_SKIP_BYTES:
        assert reader.reply(SOON) == 5


@given(st.integers(0, 200_000), st.integers(1, 70_000))
def test_a_value_can_be_passed_over(num_bytes: int, piece: int) -> None:
    """The reply behind it is the next one."""
    reader = ReplyReader(Wire(to_wire(bytes(num_bytes)) + b":5\r\n", piece))

    assert reader.bulk_length(SOON) == num_bytes
    reader.skip_bulk(num_bytes, SOON)

    assert reader.reply(SOON) == 5


@pytest.mark.parametrize("before", [b"", b":1\r\n"])
def test_a_value_that_does_not_end_where_it_says_is_a_fault(before: bytes) -> None:
    """Whether it was read to its place at once, or through a buffer that held a reply before it."""
    buffer = memoryview(bytearray(3))
    reader = ReplyReader(Wire(before + b"$3\r\nabcdef"))
    if before:
        assert reader.reply(SOON) == 1

    with pytest.raises(CallError, match="longer than it says"):
        reader.value_into([buffer], 3, SOON)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"$-1\r\n", None),
        (b"_\r\n", None),
        (b"-WRONGTYPE no\r\n", ServerError("WRONGTYPE", "WRONGTYPE no")),
        (b"$0\r\n\r\n", Value(0, None)),
    ],
)
def test_there_may_be_no_value(sent: bytes, expected: object) -> None:
    """Absent, or an error; an empty value is one."""
    for num_bytes in (1, 3, 100):
        reader = ReplyReader(Wire(sent))
        assert reader.value_into([memoryview(bytearray(num_bytes))], num_bytes, SOON) == expected


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\r\n",
        b":12x\r\n",
        b"$\r\n",
        b"$99999999999999999999999\r\n",
        b"$20000000\r\n",
        b"*9999999\r\n",
        b"*1\r\n" * 20 + b":1\r\n",
        b"$3\r\nabcd\r\n",
        b",one\r\n",
        b"+" + bytes(200_000),
        b"*100\r\n" + b"$1000000\r\n" + bytes(1_000_000) + b"\r\n" + b"$16000000\r\n",
    ],
)
def test_nonsense_is_a_fault_before_memory_is_taken(sent: bytes) -> None:
    """Another protocol, broken numbers, sizes that nobody asked for, endless lines and nesting."""
    with pytest.raises(CallError, match="RESP") as caught:
        ReplyReader(Wire(sent)).reply(SOON)

    assert caught.value.cause is MissCause.UNAVAILABLE


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_are_a_reply_or_a_fault(sent: bytes, piece: int) -> None:
    """Whatever a server sends, nothing else than CallError is raised."""
    reader = ReplyReader(Wire(sent, piece))

    def read_all() -> None:
        while True:
            reader.reply(SOON)

    with pytest.raises(CallError):
        read_all()


def test_commands_are_lists_of_words() -> None:
    """Words may hold anything, line ends too; a SET is whole around its value."""
    head, tail = encode_set_head(b"k", 5, None), encode_set_tail(None)
    ttl_head, ttl_tail = encode_set_head(b"k", 5, 1500), encode_set_tail(1500)

    assert encode(b"SET", b"a\r\nb") == b"*2\r\n$3\r\nSET\r\n$4\r\na\r\nb\r\n"
    assert head + b"value" + tail == encode(b"SET", b"k", b"value", b"NX")
    assert ttl_head + b"value" + ttl_tail == encode(b"SET", b"k", b"value", b"NX", b"PX", b"1500")
