"""Answers of the protocols whose streams are typed events: one writer makes the stream and the whole."""

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import msgspec
from fastapi import Request
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.engine import Piece
from kvkeep.server.cache_report import cache_headers
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.errors import ApiError, api_error
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_output import Json, checked, pieces_of
from kvkeep.server.service import Job, JobStream, Service
from kvkeep.server.sse import EventStream, event
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
        """What is said before the first piece."""
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

    def __init__(self, *, max_calls: int | None) -> None:
        self._parser = None if max_calls == 0 else ToolCallParser(max_calls=max_calls)

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
    async with AsyncExitStack() as resources:
        stream = await resources.enter_async_context(service.generate(prepared.job))
        if is_stream:
            events = _events(prepared.answer, stream, service.settings.keep_alive_s)
            return EventStream(events, resources.pop_all(), prepared.headers)
        receipt = await unless_disconnected(request, _last_receipt(prepared.answer, stream))
        headers = cache_headers([receipt], prepared.profile.block_size)
        return Response(
            msgspec.json.encode(prepared.answer.result()),
            media_type="application/json",
            headers={**headers, **prepared.headers},
        )


async def _last_receipt(answer: EventAnswer, stream: JobStream) -> Receipt:
    answer.start()
    async for piece in stream:
        answer.take(checked(piece))
        if piece.receipt is not None:
            return piece.receipt
    raise AssertionError("a job ends with a receipt")


async def _events(
    answer: EventAnswer, stream: JobStream, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; an error that comes late is the last one."""
    yield _encoded(answer.start())
    try:
        async for piece in pieces_of(stream, keep_alive_s):
            if piece is None:
                yield answer.keep_alive
            elif events := answer.take(piece):
                # All events of a piece leave together: one write for the server, one read for the client.
                yield _encoded(events)
    except Exception as error:  # noqa: BLE001  the client is told, and the log
        found = api_error(error)
        if found.status == 500:
            _log.error("a stream failed", exc_info=error)
        yield _encoded(answer.fail(found))


def _encoded(events: Sequence[Json]) -> bytes:
    return b"".join(event(msgspec.json.encode(one), str(one["type"])) for one in events)
