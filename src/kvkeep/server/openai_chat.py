"""POST /v1/chat/completions: from the pieces of a job to an answer, or to a stream of chunks."""

from contextlib import AsyncExitStack

from fastapi import Request
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.engine import Piece
from kvkeep.server.auth import Tenant
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.job_events import JobEvents
from kvkeep.server.jobs import JobStream
from kvkeep.server.json_answer import json_answer
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_chat_job import Chat, prepared_chat
from kvkeep.server.openai_chat_output import AnswerStyle, ChatOutput, MessageFold
from kvkeep.server.openai_chunks import ChunkStream, ChunkWriter
from kvkeep.server.openai_output import Json, batches_of
from kvkeep.server.openai_schemas import ChatRequest
from kvkeep.server.service import Service
from kvkeep.server.sse import DONE

__all__ = ["answer_chat"]


async def answer_chat(
    request: Request, body: ChatRequest, asker: Tenant, service: Service, profile: ModelProfile
) -> Response:
    """Answer a conversation, at once or as a stream. Raises what the app turns into error responses."""
    preparing = prepared_chat(request, body, asker, service, profile)
    chat = await unless_disconnected(request.receive, preparing)
    keep_alive_s = service.settings.keep_alive_s
    async with AsyncExitStack() as resources:
        stream = await resources.enter_async_context(service.generate(chat.job))
        if body.stream:
            return JobEvents(
                [stream],
                _ChatStream(chat, request.scope["path"]),
                keep_alive_s=keep_alive_s,
                resources=resources.pop_all(),
                headers=chat.fields.warnings.headers(),
            )
        whole = _whole(chat, stream, keep_alive_s)
        return await unless_disconnected(request.receive, whole)


async def _whole(chat: Chat, stream: JobStream, keep_alive_s: float) -> Response:
    outputs: dict[int, ChatOutput] = {}
    folds: dict[int, MessageFold] = {}
    receipt = None
    async for pieces in batches_of(stream, keep_alive_s):
        for piece in pieces:
            for choice in _take(outputs, chat.style, piece):
                folds.setdefault(piece.choice, MessageFold(piece.choice)).add(choice)
            receipt = piece.receipt or receipt
    assert receipt is not None, "a job ends with a receipt"
    body = chat.head("chat.completion").fields()
    body["choices"] = [folds[number].choice(chat.style) for number in sorted(folds)]
    if chat.style.has_token_ids:
        body["prompt_token_ids"] = list(chat.job.prompt_ids)
    warnings = chat.fields.warnings.headers()
    return json_answer(body | chat.usage(receipt), [receipt], chat.profile.block_size, warnings)


class _ChatStream(ChunkStream):
    """The outputs of a chat as chunks."""

    def __init__(self, chat: Chat, path: str) -> None:
        super().__init__(path)
        self._chat = chat
        head = chat.head("chat.completion.chunk")
        self._chunks = ChunkWriter(head, len(chat.job.prompt_ids), chat.body.stream_options)
        self._outputs: dict[int, ChatOutput] = {}

    def take(self, piece: Piece, number: int) -> bytes:
        chunks = self._chunks.of_piece(piece, _take(self._outputs, self._chat.style, piece))
        return chunks if piece.receipt is None else chunks + self._last(piece.receipt)

    def finish(self) -> bytes:
        return DONE

    def _last(self, receipt: Receipt) -> bytes:
        return self._chunks.last(self._chat.usage(receipt))


def _take(outputs: dict[int, ChatOutput], style: AnswerStyle, piece: Piece) -> list[Json]:
    if piece.choice not in outputs:
        outputs[piece.choice] = ChatOutput(piece.choice, style)
    return outputs[piece.choice].take(piece)
