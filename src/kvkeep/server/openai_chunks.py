"""Streams of the OpenAI protocol: chunks, the end, and an error in their place."""

from collections.abc import Sequence

import msgspec

from kvkeep.engine import Piece
from kvkeep.server.job_events import StreamWriter
from kvkeep.server.openai_output import Head, Json, late_error
from kvkeep.server.openai_schemas import StreamOptions
from kvkeep.server.sse import DONE, KEEP_ALIVE

__all__ = ["ChunkStream", "ChunkWriter"]


class ChunkWriter:
    """Writes the chunks of one stream; what all of them have in common is encoded once.

    As `options` say they have no field `usage`, or one that is null until the end, or the counts so far.
    """

    def __init__(self, head: Head, num_prompt: int, options: StreamOptions | None) -> None:
        self._counts_all = options is not None and bool(options.continuous_usage_stats)
        self._has_usage = self._counts_all or (options is not None and bool(options.include_usage))
        self._num_prompt = num_prompt
        self._num_output = 0
        self._begin = b"data: " + msgspec.json.encode(head.fields())[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if self._has_usage else b"]}\n\n"

    def of_piece(self, piece: Piece, choices: Sequence[Json]) -> bytes:
        """One chunk for each choice that a piece adds."""
        self._num_output += len(piece.token_ids)
        end = self._counted_end() if self._counts_all else self._end
        return b"".join([self._begin + msgspec.json.encode(choice) + end for choice in choices])

    def last(self, fields: Json) -> bytes:
        """The chunk without choice behind all others; nothing when no field is left to say.

        `usage` is left out where it is not asked for.
        """
        if not self._has_usage:
            fields = {name: value for name, value in fields.items() if name != "usage"}
        if not fields:
            return b""
        return self._begin + b"]," + msgspec.json.encode(fields)[1:] + b"\n\n"

    def _counted_end(self) -> bytes:
        counts = {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
        }
        return b'],"usage":' + msgspec.json.encode(counts) + b"}\n\n"


class ChunkStream(StreamWriter):
    """A stream of chunks on a route: it begins with the first, and ends with DONE, after an error too."""

    keep_alive = KEEP_ALIVE

    def __init__(self, path: str) -> None:
        self._path = path

    def start(self) -> bytes:
        """Nothing: the first chunk says what there is to say."""
        return b""

    def fail(self, error: Exception) -> bytes:
        """The event of the error."""
        return late_error(self._path, error) + DONE
