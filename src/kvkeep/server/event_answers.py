"""Answers of the protocols whose streams are typed events: one writer makes the stream and the whole."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.engine import Piece
from kvkeep.server.call_syntax import CallSyntax
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.errors import ApiError, api_error
from kvkeep.server.job_events import JobEvents, StreamWriter
from kvkeep.server.json_answer import json_answer
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_output import Json, batches_of
from kvkeep.server.service import Job, JobStream, Service
from kvkeep.server.sse import event
from kvkeep.server.tool_calls import ToolCall, ToolCallParser

__all__ = [
    "EventAnswer",
    "Parts",
    "Prepared",
    "send_answer",
]

_log = logging.getLogger(__name__)


class EventAnswer(Protocol):
    """Makes events of an answer's pieces. What they add up to is `result`, whoever reads them."""

    keep_alive: bytes

    def start(self) -> list[Json]:
        """What is said before the first piece, if anything."""
        ...

    def take(self, piece: Piece) -> list[Json]:
        """What a piece adds; the one with the receipt also ends the answer."""
        ...

    def fail(self, error: ApiError) -> list[Json]:
        """What is said of an error after the start."""
        ...

    def result(self) -> Json:
        """The answer, once it has ended."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request that is ready to run."""

    job: Job
    answer: EventAnswer
    profile: ModelProfile
    headers: Mapping[str, str]


class Parts:
    """What an answer says, as text and calls of tools. `max_calls=0` takes everything for text."""

    def __init__(self, syntax: CallSyntax, *, max_calls: int | None) -> None:
        self._parser = None if max_calls == 0 else ToolCallParser(syntax, max_calls=max_calls)

    def take(self, text: str, *, is_last: bool) -> Sequence[str | ToolCall]:
        """The parts that are certain with this text."""
        if self._parser is None:
            return [text] if text else []
        found = self._parser.feed(text)
        return [*found, *self._parser.finish()] if is_last else found


async def send_answer(
    request: Request, service: Service, prepared: Prepared, *, is_stream: bool
) -> Response:
    """Run the job and answer, at once or as a stream. Raises what the app turns into error responses."""
    keep_alive_s = service.settings.keep_alive_s
    async with AsyncExitStack() as resources:
        stream = await resources.enter_async_context(service.generate(prepared.job))
        if is_stream:
            return JobEvents(
                [stream],
                _EventWriter(prepared.answer),
                keep_alive_s=keep_alive_s,
                resources=resources.pop_all(),
                headers=prepared.headers,
            )
        whole = _last_receipt(prepared.answer, stream, keep_alive_s)
        receipt = await unless_disconnected(request.receive, whole)
        size = prepared.profile.block_size
        return json_answer(prepared.answer.result(), [receipt], size, prepared.headers)


async def _last_receipt(answer: EventAnswer, stream: JobStream, keep_alive_s: float) -> Receipt:
    answer.start()
    async for pieces in batches_of(stream, keep_alive_s):
        for piece in pieces:
            answer.take(piece)
            if piece.receipt is not None:
                return piece.receipt
    raise AssertionError("a job ends with a receipt")


class _EventWriter(StreamWriter):
    """The events of an answer as bytes."""

    def __init__(self, answer: EventAnswer) -> None:
        self._answer = answer

    @property
    def keep_alive(self) -> bytes:
        return self._answer.keep_alive

    def start(self) -> bytes:
        return _encoded(self._answer.start())

    def take(self, piece: Piece, number: int) -> bytes:
        return _encoded(self._answer.take(piece))

    def finish(self) -> bytes:
        return b""

    def fail(self, error: Exception) -> bytes:
        found = api_error(error)
        if found.status == 500:
            _log.error("a stream failed", exc_info=error)
        return _encoded(self._answer.fail(found))


def _encoded(events: Sequence[Json]) -> bytes:
    return b"".join(event(msgspec.json.encode(one), str(one["type"])) for one in events)
