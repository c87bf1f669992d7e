"""The Anthropic protocol: POST /v1/messages and /v1/messages/count_tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.engine import Piece
from kvkeep.errors import RequestError
from kvkeep.server.anthropic_prompt import (
    ChatMessage,
    chat_messages,
    chat_tools,
    marked_blocks,
    template_options,
)
from kvkeep.server.anthropic_schemas import CountTokensRequest, MessagesRequest
from kvkeep.server.anthropic_stream import (
    MessageUsage,
    MessageWriter,
    StopSequences,
    diagnostics_of,
    stop_reason,
)
from kvkeep.server.auth import Asker, Tenant
from kvkeep.server.cache_fields import (
    CacheFields,
    Warnings,
    read_cache_fields,
    without_cache_fields,
)
from kvkeep.server.cache_prompts import outline_of
from kvkeep.server.cache_report import num_written
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.errors import ApiError, error_body
from kvkeep.server.event_answers import EventAnswer, Parts, Prepared, send_answer
from kvkeep.server.model_profile import ModelProfile, profile_of
from kvkeep.server.openai_output import Json
from kvkeep.server.preparing import (
    compiled,
    output_room,
    prepared_job,
    report_of,
    template_tools,
)
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.sampling_fields import refuse_unsupported, sampling_params
from kvkeep.server.service import Job, Service, Serving
from kvkeep.server.sse import KEEP_ALIVE, event
from kvkeep.server.structured import AnswerForm

__all__ = ["routes"]

_PATH = "/v1/messages"
_PING = event(b'{"type": "ping"}', "ping")
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def routes() -> APIRouter:
    """The routes of the protocol."""
    router = APIRouter(tags=["anthropic"])

    @router.post(_PATH)
    async def create_message(
        request: Request, body: MessagesRequest, service: Serving, asker: Asker
    ) -> Response:
        """Answer a conversation, at once or as a stream."""
        preparing = _prepared(request, body, asker, service)
        prepared = await unless_disconnected(request.receive, preparing)
        return await send_answer(request, service, prepared, is_stream=bool(body.stream))

    @router.post(f"{_PATH}/count_tokens")
    async def count_tokens(
        request: Request, body: CountTokensRequest, service: Serving, asker: Asker
    ) -> dict[str, int]:
        """Count the tokens of a prompt."""
        service.check_model(body.model)
        prompt = await _encoded(body, chat_messages(body), service, asker)
        return {"input_tokens": len(prompt.ids)}

    return router


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """A request and what was found out about it."""

    body: MessagesRequest
    job: Job
    fields: CacheFields
    profile: ModelProfile

    def usage(self, reused_tokens: int, output_tokens: int) -> MessageUsage:
        options, num_prompt = self.job.options, len(self.job.prompt_ids)
        return MessageUsage(
            prompt_tokens=num_prompt,
            read_tokens=reused_tokens,
            written_tokens=num_written(num_prompt, reused_tokens, options, self.profile.block_size),
            output_tokens=output_tokens,
            ttl_s=options.ttl_s,
        )


class _MessageAnswer(EventAnswer):
    """Makes the events of a message.

    The first of them says how much of the prompt was read, so that it comes with the first piece. Until then
    comments show that the connection lives: no event may come before it.
    """

    def __init__(self, call: _Call, model: str) -> None:
        self.keep_alive = KEEP_ALIVE
        self._call = call
        self._writer = MessageWriter(f"msg_{token_hex(12)}", model)
        self._stops = StopSequences(call.job.params.stop_strings)
        self._parts = Parts(call.profile.call_syntax, max_calls=_max_calls(call.body))

    def start(self) -> list[Json]:
        return []

    def take(self, piece: Piece) -> list[Json]:
        events: list[Json] = []
        if piece.reused_tokens is not None:
            events += self._begin(piece.reused_tokens)
        text = self._stops.cut(piece)
        for part in self._parts.take(text, is_last=piece.finish_reason is not None):
            if isinstance(part, str):
                events += self._writer.say(part)
            else:
                call_id = part.call_id.replace("call_", "toolu_", 1)
                events += self._writer.call(call_id, part.name, part.arguments)
        if piece.receipt is not None:
            events += self._finish(piece, piece.receipt)
        return events

    def fail(self, error: ApiError) -> list[Json]:
        return [error_body(_PATH, error, self._call.job.request_id)]

    def result(self) -> Json:
        return self._writer.message()

    def _begin(self, reused_tokens: int) -> list[Json]:
        self.keep_alive = _PING
        # What the protocol says while a reason is looked for; it comes with the end.
        pending = {"cache_miss_reason": None} if _is_diagnosed(self._call.body) else None
        usage = self._call.usage(reused_tokens, 0)
        return self._writer.start(usage, {"diagnostics": pending})

    def _finish(self, piece: Piece, receipt: Receipt) -> list[Json]:
        assert piece.finish_reason is not None
        call = self._call
        reason = stop_reason(
            piece.finish_reason,
            stopped_by=self._stops.found,
            has_calls=self._writer.has_calls,
            is_out_of_context=receipt.output_tokens < call.body.max_tokens,
        )
        found = None
        if _is_diagnosed(call.body):
            found = diagnostics_of(
                receipt.miss,
                num_computed=receipt.computed_tokens,
                block_size=call.profile.block_size,
            )
        more = report_of(receipt, call.job, call.fields, call.profile) | {"diagnostics": found}
        usage = call.usage(receipt.reused_tokens, receipt.output_tokens)
        return self._writer.finish(reason, self._stops.found, usage, more)


async def _prepared(
    request: Request, body: MessagesRequest, asker: Tenant, service: Service
) -> Prepared:
    model = service.check_model(body.model)
    profile = await profile_of(request)
    messages = chat_messages(body)
    fields = read_cache_fields(body, request.headers, messages, marked=marked_blocks(body))
    _check_fields(body, fields.warnings)
    prompt = await _encoded(body, messages, service, asker)
    stops = body.stop_sequences if body.stop_sequences is not None else body.stop
    # Kept in the text, so that the answer can say which one it was.
    sampling = body.model_copy(update={"stop": stops, "include_stop_str_in_output": True})
    params = sampling_params(
        sampling,
        profile.defaults,
        max_tokens=output_room(body.max_tokens, profile, len(prompt.ids), fields.warnings),
        vocab_size=profile.vocab_size,
        grammar=await compiled(_form(body), profile, service, asker),
        calls=profile.call_syntax if _max_calls(body) != 0 else None,
    )
    job = prepared_job(
        request,
        asker,
        prompt,
        params,
        fields,
        route=_PATH,
        outline=outline_of(prompt, messages, _tools(body, service), template_options(body)),
    )
    job = replace(job, explain=job.explain or _is_diagnosed(body))
    call = _Call(body=body, job=job, fields=fields, profile=profile)
    # The protocol's own clients look for the id of the request here.
    headers = {**fields.warnings.headers(), "request-id": job.request_id}
    answer = _MessageAnswer(call, model)
    return Prepared(job=job, answer=answer, profile=profile, headers=headers)


def _check_fields(body: MessagesRequest, warnings: Warnings) -> None:
    """Raise RequestError for what would make another answer than this server gives; warn of the rest."""
    refuse_unsupported(body.model_extra)
    if body.n not in (None, 1):
        raise RequestError(f"n={body.n} is not part of this protocol; send the request n times")
    if body.thinking is not None and body.thinking.get("type") != "disabled":
        warnings.add("thinking is left to the chat template: thoughts are part of the text")
    if (body.output_config or {}).get("effort") is not None:
        warnings.add("output_config.effort is ignored: there is no such setting")


async def _encoded(
    body: CountTokensRequest, messages: list[ChatMessage], service: Service, asker: Tenant
) -> EncodedPrompt:
    """The prompt. Where the last turn is the assistant's, the answer goes on from its text."""
    tools, options = _tools(body, service), template_options(body)
    bare = without_cache_fields(messages)
    begun = bare[-1] if bare else None
    if begun is None or begun["role"] != "assistant" or "tool_calls" in begun:
        return await service.encode_chat(asker, bare, tools, options)
    asked = await service.encode_chat(asker, bare[:-1], tools, options)
    text = _text_of(begun["content"])
    answer = await service.encode_text(asker, text, add_special_tokens=False)
    start = len(asked.ids)
    return EncodedPrompt(
        ids=(*asked.ids, *answer.ids),
        message_starts=(*asked.message_starts, start),
        part_starts=(*asked.part_starts, (start,)),
    )


def _tools(body: CountTokensRequest, service: Service) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    may_call = choice is None or choice.type != "none"
    return template_tools(chat_tools(body.tools), service, may_call=may_call)


def _text_of(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _is_diagnosed(body: MessagesRequest) -> bool:
    """Whether the client wants to know why its prompt was not read; null begins a conversation."""
    return (body.diagnostics or {}).get("previous_message_id") is not None


def _max_calls(body: MessagesRequest) -> int | None:
    """The most calls of tools in an answer, None for any number."""
    choice = body.tool_choice
    if not body.tools or (choice is not None and choice.type == "none"):
        return 0
    return 1 if choice is not None and choice.disable_parallel_tool_use else None


def _form(body: MessagesRequest) -> AnswerForm | None:
    """What the answer must be; None for any text."""
    choice = body.tool_choice
    if choice is not None and choice.type in {"any", "tool"}:
        calls = _schemas(body, (choice.name or "") if choice.type == "tool" else None)
        is_one = bool(choice.disable_parallel_tool_use) or choice.type == "tool"
        return AnswerForm(field="tools", calls=calls, is_one_call=is_one)
    wanted = (body.output_config or {}).get("format")
    if wanted is None:
        return None
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if not isinstance(schema, Mapping) or wanted.get("type") != "json_schema":
        raise RequestError(
            "output_config.format is not understood; give type 'json_schema' and a schema"
        )
    calls = {} if _max_calls(body) == 0 else _schemas(body, None)
    is_one = _max_calls(body) == 1
    return AnswerForm(field="output_config", schema=schema, calls=calls, is_one_call=is_one)


def _schemas(body: MessagesRequest, name: str | None) -> dict[str, Mapping[str, Any]]:
    """The schemas of the tools that may be called, by name: of all, or of the one of this name."""
    schemas = {tool.name: tool.input_schema or _ANY_OBJECT for tool in body.tools or ()}
    if not schemas:
        raise RequestError("tool_choice asks for a call, and tools is empty; give tools")
    if name is None:
        return schemas
    if name not in schemas:
        raise RequestError(f"tool_choice.name={name!r:.80} is none of tools; add it to tools")
    return {name: schemas[name]}
