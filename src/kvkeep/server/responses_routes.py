"""The Responses protocol, as far as it is text: POST /v1/responses, GET and DELETE by id."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from secrets import token_hex
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import Response

from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.errors import RequestError
from kvkeep.server.auth import Asker, Tenant
from kvkeep.server.cache_erasures import Watch
from kvkeep.server.cache_fields import Warnings, read_cache_fields, without_cache_fields
from kvkeep.server.cache_orders import close_session
from kvkeep.server.cache_prompts import outline_of
from kvkeep.server.cache_state import CacheState, Kept
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.errors import ApiError
from kvkeep.server.event_answers import Prepared, send_answer
from kvkeep.server.model_profile import ModelProfile, profile_of
from kvkeep.server.openai_output import Json
from kvkeep.server.preparing import compiled, output_room, prepared_job, template_tools
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.responses_answer import ResponseAnswer, ResponseStyle
from kvkeep.server.responses_fields import (
    LOGPROBS,
    answer_form,
    check_fields,
    echoed_fields,
    max_calls,
)
from kvkeep.server.responses_history import KeptResponse, ResponseHistory
from kvkeep.server.responses_prompt import chat_tools, input_items, item_messages
from kvkeep.server.responses_schemas import ResponsesRequest
from kvkeep.server.sampling_fields import sampling_params
from kvkeep.server.service import Job, Service, Serving

__all__ = ["routes"]

_PATH = "/v1/responses"
_ONE = _PATH + "/{response_id}"


def routes() -> APIRouter:
    """The routes of the protocol."""
    router = APIRouter(tags=["responses"])

    @router.post(_PATH)
    async def create_response(
        request: Request, body: ResponsesRequest, service: Serving, asker: Asker, kept: Kept
    ) -> Response:
        """Answer a prompt, or go on from an earlier response; at once or as a stream."""
        preparing = _prepared(request, body, asker, service, kept)
        prepared = await unless_disconnected(request.receive, preparing)
        response = await send_answer(request, service, prepared, is_stream=bool(body.stream))
        response.background = BackgroundTask(_close_ended, service, kept.responses)
        return response

    @router.get(_ONE)
    async def read_response(response_id: str, asker: Asker, kept: Kept) -> Response:
        """An earlier response as it was given."""
        found = kept.responses.find(asker.tenant_id, response_id)
        if found is None:
            raise _unknown(response_id, status=404, param=None)
        # As it was encoded the first time: other encoders refuse numbers without end.
        return Response(msgspec.json.encode(found.response), media_type="application/json")

    @router.delete(_ONE)
    async def delete_response(
        response_id: str, asker: Asker, service: Serving, kept: Kept
    ) -> dict[str, Any]:
        """Forget a response; with the last one of a conversation goes what only that has cached."""
        if kept.responses.drop(asker.tenant_id, response_id) is None:
            raise _unknown(response_id, status=404, param=None)
        await _close_ended(service, kept.responses)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


@dataclass(frozen=True, kw_only=True, slots=True)
class _Thread:
    """The conversation that a response belongs to, up to the new input; `messages` without instructions."""

    response_id: str
    messages: Sequence[Mapping[str, Any]]
    previous: KeptResponse | None

    def options(self, given: CacheOptions, *, is_kept: bool) -> CacheOptions:
        """The options with the conversation's session, unless the client names one.

        A response that cannot be continued begins no session: others may share its blocks for good.
        """
        if given.session is not None:
            return given
        if self.previous is not None:
            return replace(given, session=self.previous.session)
        return replace(given, session=self.response_id) if is_kept else given


async def _prepared(
    request: Request,
    body: ResponsesRequest,
    asker: Tenant,
    service: Service,
    kept: CacheState,
) -> Prepared:
    model = service.check_model(body.model)
    profile = await profile_of(request)
    thread = _thread(body, asker, kept.responses)
    messages = _with_instructions(body, thread.messages)
    fields = read_cache_fields(body, request.headers, messages)
    watch = kept.watch(asker, asker.salt_for(fields.options.salt))
    check_fields(body, fields.warnings)
    tools = template_tools(chat_tools(body.tools), service, may_call=max_calls(body) != 0)
    prompt = await service.encode_chat(asker, without_cache_fields(messages), tools)
    params = await _params(body, profile, service, asker, prompt, fields.warnings)
    is_kept = body.store is not False
    outline = outline_of(prompt, messages, tools, None)
    job = prepared_job(request, asker, prompt, params, fields, route=_PATH, outline=outline)
    job = replace(job, options=thread.options(job.options, is_kept=is_kept))
    style = ResponseStyle(
        head=_head(body, thread, model, params),
        item_id=thread.response_id.removeprefix("resp_"),
        texts=None if params.logprobs is None else profile.token_texts,
        max_calls=max_calls(body),
    )
    owns = fields.options.session is None and (
        thread.previous is None or thread.previous.owns_session
    )
    keep: Callable[[Json], None] = _keep_nothing
    if is_kept:
        keep = partial(_keep, kept.responses, watch, job, thread, owns_session=owns)
    answer = ResponseAnswer(job, style, fields=fields, profile=profile, keep=keep)
    return Prepared(job=job, answer=answer, profile=profile, headers=fields.warnings.headers())


def _thread(body: ResponsesRequest, asker: Tenant, history: ResponseHistory) -> _Thread:
    """The conversation so far with the new input. Raises ApiError 400 for an unknown response."""
    previous = None
    before: Sequence[Mapping[str, Any]] = ()
    if body.previous_response_id is not None:
        previous = history.find(asker.tenant_id, body.previous_response_id)
        if previous is None:
            raise _unknown(body.previous_response_id, status=400, param="previous_response_id")
        before = previous.messages
    new = item_messages(input_items(body.input), before)
    if not before and not new and not body.instructions:
        raise RequestError("input is empty; give text or items")
    return _Thread(response_id=f"resp_{token_hex(20)}", messages=(*before, *new), previous=previous)


def _with_instructions(
    body: ResponsesRequest, messages: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The messages as the template gets them; instructions hold for one response only."""
    if not body.instructions:
        return list(messages)
    return [{"role": "system", "content": body.instructions}, *messages]


async def _params(
    body: ResponsesRequest,
    profile: ModelProfile,
    service: Service,
    asker: Tenant,
    prompt: EncodedPrompt,
    warnings: Warnings,
) -> SamplingParams:
    wants_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    return sampling_params(
        body,
        profile.defaults,
        max_tokens=output_room(body.max_output_tokens, profile, len(prompt.ids), warnings),
        vocab_size=profile.vocab_size,
        logprobs=body.top_logprobs or 0 if wants_logprobs else None,
        grammar=await compiled(answer_form(body), profile, service, asker),
        calls=profile.call_syntax if max_calls(body) != 0 else None,
    )


def _head(body: ResponsesRequest, thread: _Thread, model: str, params: SamplingParams) -> Json:
    return {
        "id": thread.response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        **echoed_fields(body, params),
    }


def _keep_nothing(response: Json) -> None:
    """For who does not want to continue a response."""


def _keep(
    history: ResponseHistory,
    watch: Watch,
    job: Job,
    thread: _Thread,
    response: Json,
    *,
    owns_session: bool,
) -> None:
    """Make it possible to continue the response, unless its tenant was erased meanwhile."""
    if watch.is_erased:
        return
    session = job.options.session
    assert session is not None, "a response that is kept has a session"
    said = item_messages(response["output"])
    history.keep(
        job.tenant.tenant_id,
        KeptResponse(
            response=response,
            messages=(*thread.messages, *said),
            session=session,
            salt=job.options.salt,
            owns_session=owns_session,
        ),
    )


async def _close_ended(service: Service, history: ResponseHistory) -> None:
    """Forget what only conversations have cached that nobody can continue; sessions are not to pile up."""
    for kept in history.take_ended():
        await close_session(service, kept.session, kept.salt)


def _unknown(response_id: str, *, status: int, param: str | None) -> ApiError:
    return ApiError(
        status,
        f"response {response_id!r:.80} is unknown; it was never stored, was deleted, or its time is over: "
        "send the whole conversation as input",
        kind="invalid_request_error",
        param=param,
        code="previous_response_not_found" if param else "response_not_found",
    )
