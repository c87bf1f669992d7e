"""Request traces as JSON lines, in the format of the public Mooncake traces (docs/traces.md)."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from kvkeep.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "TraceRequest", "read_trace", "write_trace"]

# Tokens that one id of a public trace stands for.
BLOCK_TOKENS = 512

_Count = Annotated[int, msgspec.Meta(ge=0)]


class TraceRequest(msgspec.Struct, frozen=True, kw_only=True, rename={"timestamp_ms": "timestamp"}):
    """One request: when it came, its tokens, and an id for each block of its input, the last one partial.

    Equal ids behind equal ids mean equal tokens from the first on. What the output was is not known.
    """

    timestamp_ms: float
    input_length: _Count
    output_length: _Count
    hash_ids: tuple[int, ...]


def read_trace(path: Path, *, block_tokens: int = BLOCK_TOKENS) -> list[TraceRequest]:
    """The requests of a file in order of time; members that are not ours are ignored.

    Raises ConfigError, with the line, for what is no request, and for one whose ids are not as many as its
    input has blocks of `block_tokens` tokens.
    """
    decoder = msgspec.json.Decoder(TraceRequest)
    requests: list[TraceRequest] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    requests.append(_request(decoder, line, f"{path}:{number}", block_tokens))
    except OSError as error:
        raise ConfigError(
            f"trace={str(path)!r} cannot be read ({error.strerror}); give a file of JSON lines"
        ) from error
    return sorted(requests, key=lambda request: request.timestamp_ms)


def _request(
    decoder: "msgspec.json.Decoder[TraceRequest]", line: bytes, where: str, block_tokens: int
) -> TraceRequest:
    try:
        request = decoder.decode(line)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{where} is no request ({error}); give timestamp, input_length, output_length and hash_ids"
        ) from error
    num_blocks = -(-request.input_length // block_tokens)
    if len(request.hash_ids) != num_blocks:
        raise ConfigError(
            f"{where}: hash_ids has {len(request.hash_ids)} ids, and input_length={request.input_length} is "
            f"{num_blocks} blocks of {block_tokens} tokens; give the trace's own block size"
        )
    return request


def write_trace(path: Path, requests: Iterable[TraceRequest]) -> int:
    """Write requests as JSON lines, in place of what the file had; returns how many there were.

    Raises ConfigError when the file cannot be written.
    """
    encoder, num_requests = msgspec.json.Encoder(), 0
    try:
        with path.open("wb") as file:
            for request in requests:
                file.write(encoder.encode(request) + b"\n")
                num_requests += 1
    except OSError as error:
        raise ConfigError(
            f"output={str(path)!r} cannot be written ({error.strerror}); choose another place"
        ) from error
    return num_requests
