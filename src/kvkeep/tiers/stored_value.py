"""An object with its labels as one value of a store on another machine.

The tail is that of a file (see `trailer`). Values of before have none, and no labels. Where labels are to be
replaced it has room for longer ones: a RESP server that makes a value longer takes up to twice its memory.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Got, Labelled, Miss, MissCause
from kvkeep.tiers.trailer import (
    TRAILER_BYTES,
    encode_tail,
    labels_at_end,
    labels_behind,
    parse_trailer,
)
from kvkeep.tiers.views import last_bytes

__all__ = [
    "MAX_LABEL_BYTES",
    "ROOM_BYTES",
    "End",
    "Listed",
    "ValueForm",
    "is_tail",
    "judge",
    "labelled_values",
    "read_labels",
    "roomy_tail",
]

# A tail with room is a multiple of it; nearly all labels fit in one.
ROOM_BYTES = 512
MAX_LABEL_BYTES = 1 << 20
_MAX_TAIL_BYTES = MAX_LABEL_BYTES + ROOM_BYTES


@dataclass(frozen=True, slots=True)
class ValueForm:
    """What the end of a value says: the length of the object in it, and its labels.

    `labels` are None where they are damaged, or are more than was read: then read the last `end_bytes`.
    """

    num_bytes: int
    labels: bytes | None
    end_bytes: int


@dataclass(frozen=True, slots=True)
class End:
    """The length of a value, and its last bytes: all of it, or TRAILER_BYTES at least."""

    length: int
    end: bytes | memoryview

    def form(self) -> ValueForm:
        """What they say."""
        trailer = parse_trailer(self.end)
        if trailer is None or trailer.num_bytes + trailer.tail_bytes > self.length:
            return ValueForm(self.length, b"", 0)
        labels = labels_at_end(self.end, trailer)
        return ValueForm(trailer.num_bytes, labels, trailer.tail_bytes)


@dataclass(frozen=True, slots=True)
class Listed:
    """A value of a store, by the key of its object."""

    key: StoredKey
    form: ValueForm


def is_tail(num_bytes: int) -> bool:
    """Whether so many bytes can be behind an object."""
    return num_bytes == 0 or TRAILER_BYTES <= num_bytes <= _MAX_TAIL_BYTES


def roomy_tail(num_bytes: int, labels: bytes, *, least_bytes: int = ROOM_BYTES) -> bytes:
    """What follows an object of `num_bytes`, `least_bytes` or more, with room for other labels."""
    needed = max(least_bytes, len(labels) + TRAILER_BYTES)
    room_bytes = ROOM_BYTES if needed <= ROOM_BYTES else -(-needed // ROOM_BYTES) * ROOM_BYTES
    return encode_tail(num_bytes, labels, least_bytes=room_bytes)


def judge(
    views: Sequence[memoryview], tail: bytes | bytearray | memoryview, wanted: int
) -> Got | Miss:
    """What a value is whose first `wanted` bytes are in byte views, and whose rest is `tail`."""
    labels = labels_behind(tail, wanted)
    if labels is not None:
        return Got(wanted, labels)
    end = tail or last_bytes(views, TRAILER_BYTES)
    found = End(wanted + len(tail), memoryview(end)).form()
    if found.num_bytes != wanted:
        return Miss(MissCause.SHORT, f"{found.num_bytes} bytes there, {wanted} wanted")
    return Got(wanted) if not tail else Miss(MissCause.CORRUPT, "labels")


def read_labels(read: Callable[[int], End | None]) -> bytes | None:
    """The labels of a value, of which `read` gives as many last bytes as it is asked for.

    None where there is no value, or its labels are damaged.
    """
    end_bytes = ROOM_BYTES
    while True:
        end = read(end_bytes)
        if end is None:
            return None
        form = end.form()
        if form.labels is not None or form.end_bytes <= end_bytes:
            return form.labels
        end_bytes = form.end_bytes


def labelled_values(
    listed: Iterable[Listed], labels: Callable[[StoredKey], bytes | None]
) -> Iterator[Labelled]:
    """What was listed, with labels; those that a listing did not show whole are asked for.

    What has damaged labels is left out, as no get gives it.
    """
    for one in listed:
        found = one.form.labels
        if found is None:
            found = labels(one.key)
        if found is not None:
            yield Labelled(one.key, one.form.num_bytes, found)
