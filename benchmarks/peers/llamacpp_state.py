"""llama.cpp's saved state of one sequence: taken apart, and put together again for more tokens.

The state is what `llama_state_seq_get_data` gives, all integers little-endian (llama.cpp,
src/llama-kv-cache.cpp, `state_write`): in newer versions a number that says what this is, and the sequence
(src/llama-context.cpp, `state_seq_get_data`); the number of streams; for each stream the number of its
cells, 0 for the streams of other sequences; for each cell its position, the number of its sequences and
these; whether values are transposed and the number of layers; for each layer's keys, and after them each
layer's values, the type, the bytes of a row, and one row for each cell. Imports Python only.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["SequenceState", "StateFormatError", "parse_state"]

_MAGIC = 0xAF143CD8


class StateFormatError(ValueError):
    """The bytes are not in the order that is known here."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """`num_cells` tokens of one sequence: the type and the rows of each layer's keys, then values."""

    header: bytes
    num_streams: int
    stream: int
    num_cells: int
    sequence: int
    parts: tuple[tuple[int, bytes], ...]

    def grown(self, num_cells: int) -> Iterator[bytes]:
        """The state of `num_cells` tokens, in pieces: the rows there are, over and over."""
        yield self.header + struct.pack("<I", self.num_streams)
        yield struct.pack("<I", 0) * self.stream
        yield struct.pack("<I", num_cells)
        for position in range(num_cells):
            yield struct.pack("<iIi", position, 1, self.sequence)
        yield struct.pack("<II", 0, len(self.parts) // 2)
        for kind, rows in self.parts:
            row_bytes = len(rows) // self.num_cells
            yield struct.pack("<iQ", kind, row_bytes)
            times, rest = divmod(num_cells, self.num_cells)
            yield rows * times + rows[: rest * row_bytes]
        yield struct.pack("<I", 0) * (self.num_streams - self.stream - 1)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, count: int) -> bytes:
        piece = self._content[self._at : self._at + count]
        if len(piece) < count:
            raise StateFormatError("the state ends too early")
        self._at += count
        return piece

    def number(self, kind: str = "I") -> int:
        found: int = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]
        return found

    @property
    def num_left(self) -> int:
        return len(self._content) - self._at


def parse_state(content: bytes) -> SequenceState:
    """Take a state apart. Raises StateFormatError when it is not as this file describes it."""
    header = content[:8] if content[:4] == struct.pack("<I", _MAGIC) else b""
    reader, found = _Reader(content[len(header) :]), None
    num_streams = reader.number()
    if not 1 <= num_streams <= 256:
        raise StateFormatError(f"{num_streams} streams")
    for stream in range(num_streams):
        num_cells = reader.number()
        if num_cells == 0:
            continue
        if found is not None:
            raise StateFormatError("cells in more than one stream")
        found = _parse_stream(reader, header, num_streams, stream, num_cells)
    if found is None or reader.num_left:
        raise StateFormatError(f"{reader.num_left} bytes too many")
    if b"".join(found.grown(found.num_cells)) != content:
        raise StateFormatError("put together again it is another one")
    return found


def _parse_stream(
    reader: _Reader, header: bytes, num_streams: int, stream: int, num_cells: int
) -> SequenceState:
    sequence = 0
    for position in range(num_cells):
        if (reader.number("i"), reader.number()) != (position, 1):
            raise StateFormatError(
                f"cell {position} is of another position, or of several sequences"
            )
        sequence = reader.number("i")
    are_transposed, num_layers = reader.number(), reader.number()
    if are_transposed or not 1 <= num_layers <= 1024:
        raise StateFormatError("values are transposed, or the number of layers makes no sense")
    parts = []
    for _ in range(2 * num_layers):
        kind, row_bytes = reader.number("i"), reader.number("Q")
        parts.append((kind, reader.take(row_bytes * num_cells)))
    return SequenceState(header, num_streams, stream, num_cells, sequence, tuple(parts))
