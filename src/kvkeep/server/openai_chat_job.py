"""A chat request becomes a job: its prompt, how tokens are chosen, what the answer must look like."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from kvkeep.cache import Receipt
from kvkeep.errors import RequestError
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_fields import CacheFields, read_cache_fields, without_cache_fields
from kvkeep.server.cache_prompts import outline_of
from kvkeep.server.cache_report import usage_fields, written_tokens
from kvkeep.server.jobs import Job
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_chat_output import AnswerStyle
from kvkeep.server.openai_output import Head, Json
from kvkeep.server.openai_schemas import ChatMessage, ChatRequest, NamedTool
from kvkeep.server.preparing import (
    compiled,
    output_room,
    prepared_job,
    report_of,
    template_tools,
)
from kvkeep.server.sampling_fields import refuse_unsupported, sampling_params
from kvkeep.server.service import Service
from kvkeep.server.structured import AnswerForm
from kvkeep.server.token_texts import TokenTexts
from kvkeep.server.tool_calls import with_parsed_arguments

__all__ = ["Chat", "prepared_chat", "template_messages"]

_ROUTE = "/v1/chat/completions"
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A request that is ready to run."""

    body: ChatRequest
    job: Job
    model: str
    profile: ModelProfile
    fields: CacheFields
    style: AnswerStyle

    def head(self, kind: str) -> Head:
        """The head of a new answer; `kind` is what the protocol calls its objects."""
        return Head.fresh(
            "chatcmpl",
            kind,
            created_s=int(time.time()),
            model=self.model,
            fingerprint=self.profile.fingerprint,
        )

    def usage(self, receipt: Receipt) -> Json:
        """The counts, and with `explain` what the cache did."""
        written = written_tokens(receipt, self.job.options, self.profile.block_size)
        usage = {"usage": usage_fields([receipt], written)}
        return usage | report_of(receipt, self.job, self.fields, self.profile)


async def prepared_chat(
    request: Request, body: ChatRequest, asker: Tenant, service: Service, profile: ModelProfile
) -> Chat:
    """The request, ready to run. Raises RequestError, ConfigError or ApiError for one that cannot be."""
    model = service.check_model(body.model)
    refuse_unsupported(body.model_extra)
    told = template_messages(body.messages)
    messages = without_cache_fields(told)
    tools, template_options = _tools(body, service), body.chat_template_kwargs or {}
    marked = [tool.model_extra or {} for tool in body.tools or ()]
    fields = read_cache_fields(body, request.headers, told, marked=marked)
    prompt = await service.encode_chat(
        asker,
        messages,
        tools,
        template_options,
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    grammar = await compiled(_answer_form(body), profile, service, asker)
    texts = _texts(body, profile)
    syntax = profile.call_syntax if body.tools and body.tool_choice != "none" else None
    params = sampling_params(
        body,
        profile.defaults,
        max_tokens=output_room(_asked(body), profile, len(prompt.ids), fields.warnings),
        vocab_size=profile.vocab_size,
        logprobs=None if texts is None else body.top_logprobs or 0,
        grammar=grammar,
        calls=syntax,
    )
    job = prepared_job(
        request,
        asker,
        prompt,
        params,
        fields,
        route=_ROUTE,
        outline=outline_of(prompt, messages, tools, template_options),
    )
    style = AnswerStyle(
        texts=texts,
        has_token_ids=bool(body.return_token_ids),
        syntax=syntax,
        max_calls=1 if body.parallel_tool_calls is False else None,
    )
    return Chat(body=body, job=job, model=model, profile=profile, fields=fields, style=style)


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as chat templates know them, with what they say of the cache."""
    found = []
    for message in messages:
        fields = message.model_dump(exclude_unset=True)
        if message.role == "developer":
            fields["role"] = "system"
        found.append(with_parsed_arguments(fields))
    return found


def _asked(body: ChatRequest) -> int | None:
    newer = body.max_completion_tokens
    return body.max_tokens if newer is None else newer


def _texts(body: ChatRequest, profile: ModelProfile) -> TokenTexts | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(f"top_logprobs={body.top_logprobs} needs logprobs; set it to true")
    return profile.token_texts if body.logprobs else None


def _tools(body: ChatRequest, service: Service) -> list[dict[str, Any]] | None:
    choice = body.tool_choice
    if not body.tools and choice is not None and choice not in ("none", "auto"):
        raise RequestError("tool_choice asks for a call, and tools is empty; give tools")
    # `strict` is for the server, and no model has seen it in a prompt.
    dumped = [
        tool.model_dump(exclude_none=True, exclude={"function": {"strict"}})
        for tool in body.tools or ()
    ]
    tools = without_cache_fields(dumped)
    return template_tools(tools or None, service, may_call=choice != "none")


def _answer_form(body: ChatRequest) -> AnswerForm | None:
    """What the answer must be; None for any text."""
    choice = body.tool_choice
    is_call = choice == "required" or isinstance(choice, NamedTool)
    schema = None if is_call else _schema(body)
    if not is_call and schema is None:
        return None
    calls = {} if choice == "none" else _functions(body)
    is_one = isinstance(choice, NamedTool) or body.parallel_tool_calls is False
    field = "tools" if schema is None else "response_format"
    return AnswerForm(field=field, schema=schema, calls=calls, is_one_call=is_one)


def _functions(body: ChatRequest) -> dict[str, Mapping[str, Any]]:
    """The functions that may be called, with the schemas of their parameters."""
    functions = {
        tool.function.name: tool.function.parameters or _ANY_OBJECT for tool in body.tools or ()
    }
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        if name not in functions:
            raise RequestError(f"tool_choice.function.name={name!r:.80} is none of tools; add it")
        return {name: functions[name]}
    return functions


def _schema(body: ChatRequest) -> Mapping[str, Any] | None:
    given = body.response_format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return _ANY_OBJECT
    if given.json_schema is None:
        raise RequestError("response_format.json_schema is missing; give it, or type json_object")
    return given.json_schema.schema_
