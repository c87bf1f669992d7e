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
from kvkeep.server.sse import event
from kvkeep.server.token_texts import TokenTexts

__all__ = [
    "Head",
    "Json",
    "batches_of",
    "failure_of",
    "late_error",
    "logprob_entry",
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


async def batches_of(
    stream: JobStream, keep_alive_s: float
) -> AsyncGenerator[Sequence[Piece], None]:
    """The pieces of a job that was entered, all that are there at once; none when none came in time.

    Raises ApiError for an output that did not end as it should, behind the pieces before it.
    """
    while True:
        is_ready = await stream.ready(keep_alive_s)
        pieces = stream.take()
        if is_ready and not pieces:
            return
        good = []
        for piece in pieces:
            failure = failure_of(piece)
            if failure is None:
                good.append(piece)
                continue
            if good:
                yield good
            raise failure
        yield good
        if good and good[-1].receipt is not None:
            return


def failure_of(piece: Piece) -> ApiError | None:
    """The error for a piece with which the engine gave its output up."""
    if piece.failure is not None:
        return ApiError(
            400,
            f"the answer's required form cannot be followed any further: {piece.failure}; give a schema with "
            "fewer alternatives, optional properties and patterns",
            code="form_too_complex",
        )
    if piece.finish_reason is FinishReason.ERROR:
        return ApiError(
            500,
            "the model failed on this request, or the required form left no token to choose; try again, or "
            "without response_format",
            code="generation_failed",
        )
    if piece.finish_reason is FinishReason.ABORT:
        return ApiError(
            503,
            "the server stopped before the answer was finished; send the request again",
            code="unavailable",
        )
    return None


def late_error(path: str, error: Exception) -> bytes:
    """The event of an error that comes when the status has long been sent."""
    found = api_error(error)
    if found.status == 500:
        _log.error("a stream of %s failed", path, exc_info=error)
    return event(msgspec.json.encode(error_body(path, found)))


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
