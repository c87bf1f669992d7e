"""POST /v1/chat/completions: from the pieces of a job to an answer, or to a stream of chunks."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack

import msgspec
from fastapi import Request
from starlette.responses import Response

from kvkeep.engine import Piece
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_report import cache_headers
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.jobs import JobStream
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_chat_job import Chat, prepared_chat
from kvkeep.server.openai_chat_output import AnswerStyle, ChatOutput, MessageFold
from kvkeep.server.openai_output import Json, RunningCounts, json_event, late_error, pieces_of
from kvkeep.server.openai_schemas import ChatRequest
from kvkeep.server.service import Service
from kvkeep.server.sse import DONE, KEEP_ALIVE, EventStream

__all__ = ["answer_chat"]


async def answer_chat(
    request: Request, body: ChatRequest, asker: Tenant, service: Service, profile: ModelProfile
) -> Response:
    """Answer a conversation, at once or as a stream. Raises what the app turns into error responses."""
    chat = await prepared_chat(request, body, asker, service, profile)
    async with AsyncExitStack() as resources:
        stream = await resources.enter_async_context(service.generate(chat.job))
        if body.stream:
            events = _events(chat, stream, service.settings.keep_alive_s, request.url.path)
            return EventStream(events, resources.pop_all(), chat.fields.warnings.headers())
        whole = _whole(chat, stream, service.settings.keep_alive_s)
        return await unless_disconnected(request, whole)


async def _whole(chat: Chat, stream: JobStream, keep_alive_s: float) -> Response:
    outputs: dict[int, ChatOutput] = {}
    folds: dict[int, MessageFold] = {}
    receipt = None
    async for piece in pieces_of(stream, keep_alive_s):
        if piece is None:
            continue
        for choice in _take(outputs, chat.style, piece):
            folds.setdefault(piece.choice, MessageFold(piece.choice)).add(choice)
        receipt = piece.receipt or receipt
    assert receipt is not None, "a job ends with a receipt"
    body = chat.head("chat.completion").fields()
    body["choices"] = [folds[number].choice(chat.style) for number in sorted(folds)]
    if chat.style.has_token_ids:
        body["prompt_token_ids"] = list(chat.job.prompt_ids)
    headers = cache_headers([receipt], chat.profile.block_size)
    return Response(
        msgspec.json.encode(body | chat.usage(receipt)),
        media_type="application/json",
        headers=headers | chat.fields.warnings.headers(),
    )


async def _events(
    chat: Chat, stream: JobStream, keep_alive_s: float, path: str
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; an error that comes late is the last one before the end."""
    try:
        async for events in _chunks(chat, stream, keep_alive_s):
            yield events
    except Exception as error:  # noqa: BLE001  the client is told, and the log
        yield late_error(path, error)
    yield DONE


async def _chunks(
    chat: Chat, stream: JobStream, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    head = chat.head("chat.completion.chunk").fields()
    counts = RunningCounts(len(chat.job.prompt_ids), chat.body.stream_options)
    outputs: dict[int, ChatOutput] = {}
    receipt = None
    async for piece in pieces_of(stream, keep_alive_s):
        if piece is None:
            yield KEEP_ALIVE
            continue
        head |= counts.after(piece)
        choices = _take(outputs, chat.style, piece)
        if choices:
            # All events of a piece leave together: one write for the server, one read for the client.
            yield b"".join(json_event(head | {"choices": [choice]}) for choice in choices)
        receipt = piece.receipt or receipt
    if receipt is not None and (counts.wants_last or chat.fields.explain):
        found = chat.usage(receipt)
        if not counts.wants_last:
            del found["usage"]
        yield json_event(head | {"choices": []} | found)


def _take(outputs: dict[int, ChatOutput], style: AnswerStyle, piece: Piece) -> list[Json]:
    if piece.choice not in outputs:
        outputs[piece.choice] = ChatOutput(piece.choice, style)
    return outputs[piece.choice].take(piece)
