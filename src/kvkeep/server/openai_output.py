"""What all answers of the OpenAI protocol share: their head, their pieces, probabilities of tokens."""

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import msgspec

from kvkeep.engine import FinishReason, Piece
from kvkeep.engine.sampler import Sampled
from kvkeep.server.errors import ApiError, api_error, error_body
from kvkeep.server.jobs import JobStream
from kvkeep.server.openai_schemas import StreamOptions
from kvkeep.server.sse import event
from kvkeep.server.token_texts import TokenTexts

__all__ = [
    "Head",
    "Json",
    "RunningCounts",
    "checked",
    "json_event",
    "late_error",
    "logprob_entry",
    "pieces_of",
    "reported",
]

Json = dict[str, Any]  # any: what goes into JSON

_log = logging.getLogger(__name__)
# JSON has no infinity.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What every object of one answer begins with."""

    answer_id: str
    kind: str
    created_s: int
    model: str
    fingerprint: str

    @classmethod
    def fresh(
        cls, prefix: str, kind: str, *, created_s: int, model: str, fingerprint: str
    ) -> "Head":
        """The head of a new answer, with an id that no other has."""
        return cls(
            answer_id=f"{prefix}-{token_hex(16)}",
            kind=kind,
            created_s=created_s,
            model=model,
            fingerprint=fingerprint,
        )

    def fields(self) -> Json:
        """The fields of the protocol, for an object of this kind."""
        return {
            "id": self.answer_id,
            "object": self.kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class RunningCounts:
    """Usage while a stream runs: nothing, null until the end, or counts with every chunk, as asked for."""

    def __init__(self, num_prompt: int, options: StreamOptions | None) -> None:
        self.wants_last = options is not None and bool(options.include_usage)
        self._wants_all = options is not None and bool(options.continuous_usage_stats)
        self._num_prompt = num_prompt
        self._num_output = 0

    def after(self, piece: Piece) -> Json:
        """The field `usage` of the chunks of this piece."""
        self._num_output += len(piece.token_ids)
        if not self._wants_all:
            return {"usage": None} if self.wants_last else {}
        counts = {
            "prompt_tokens": self._num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": self._num_prompt + self._num_output,
        }
        return {"usage": counts}


async def pieces_of(stream: JobStream, keep_alive_s: float) -> AsyncGenerator[Piece | None, None]:
    """The pieces of a job that was entered; None for every `keep_alive_s` without one.

    Raises ApiError for outputs that did not end as they should.
    """
    while True:
        while not await stream.ready(keep_alive_s):
            yield None
        try:
            piece = await anext(stream)
        except StopAsyncIteration:
            return
        yield checked(piece)
        if piece.receipt is not None:
            return


def checked(piece: Piece) -> Piece:
    """The piece. Raises ApiError when the engine gave its output up."""
    if piece.finish_reason is FinishReason.ERROR:
        raise ApiError(
            500,
            "the model failed on this request, or the required form left no token to choose; try again, or "
            "without response_format",
            code="generation_failed",
        )
    if piece.finish_reason is FinishReason.ABORT:
        raise ApiError(
            503,
            "the server stopped before the answer was finished; send the request again",
            code="unavailable",
        )
    return piece


def late_error(path: str, error: Exception) -> bytes:
    """The event of an error that comes when the status has long been sent."""
    found = api_error(error)
    if found.status == 500:
        _log.error("a stream of %s failed", path, exc_info=error)
    return json_event(error_body(path, found))


def json_event(chunk: Json) -> bytes:
    """One chunk of a stream."""
    return event(msgspec.json.encode(chunk))


def reported(piece: Piece, texts: TokenTexts) -> Sequence[Sampled]:
    """The tokens whose probabilities a client is told: the one that ends an output has no text, and goes."""
    sampled = piece.sampled
    if piece.finish_reason is FinishReason.STOP and sampled:
        return sampled[:-1] if texts.is_special(sampled[-1].token_id) else sampled
    return sampled


def logprob_entry(token_id: int, logprob: float | None, texts: TokenTexts) -> Json:
    """A token and its probability as chat answers have them."""
    raw = texts.raw(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": _LEAST_LOGPROB if logprob is None else max(logprob, _LEAST_LOGPROB),
        "bytes": list(raw),
    }
