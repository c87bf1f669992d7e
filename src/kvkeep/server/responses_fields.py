"""Fields of a Responses request beside its input: what is refused, what form is asked for, what is echoed."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvkeep.config import SamplingParams
from kvkeep.errors import RequestError
from kvkeep.server.block_fields import shown
from kvkeep.server.cache_fields import Warnings
from kvkeep.server.responses_schemas import ResponsesRequest
from kvkeep.server.sampling_fields import refuse_unsupported
from kvkeep.server.structured import AnswerForm

__all__ = ["LOGPROBS", "answer_form", "check_fields", "echoed_fields", "max_calls"]

# What `include` asks for when the probabilities of tokens are wanted.
LOGPROBS = "message.output_text.logprobs"
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_MAX_METADATA, _MAX_METADATA_NAME, _MAX_LABEL = 16, 64, 512
# What is echoed of objects of the request; a client may have sent megabytes beside it.
_TOOL_FIELDS = ("type", "name", "description", "parameters", "strict")
_FORMAT_FIELDS = ("type", "name", "description", "schema", "strict")
_CHOICE_FIELDS = ("type", "name")


def check_fields(body: ResponsesRequest, warnings: Warnings) -> None:
    """Raise RequestError for what would make another answer than this server gives; warn of the rest."""
    refuse_unsupported(body.model_extra)
    if body.background:
        raise RequestError("background=True is not supported; leave it out and read a stream")
    if body.conversation is not None:
        raise RequestError(
            "conversation is not supported; continue with previous_response_id, or name a session in kv_cache"
        )
    if body.prompt is not None:
        raise RequestError("prompt is a template of another server; write it out as input")
    if body.n not in (None, 1):
        raise RequestError(f"n={body.n} is not part of this protocol; send the request n times")
    if body.truncation not in (None, "disabled"):
        warnings.add("truncation is ignored: a prompt that is too long is refused")
    if body.reasoning:
        warnings.add("reasoning is ignored: no thoughts are told apart from the answer")
    if (body.text or {}).get("verbosity") is not None:
        warnings.add("text.verbosity is ignored: say in the prompt how long the answer should be")
    _check_labels(body)
    for wanted in body.include or ():
        if wanted != LOGPROBS:
            warnings.add(f"include={shown(wanted)} is ignored: there is nothing of the kind")


def max_calls(body: ResponsesRequest) -> int | None:
    """The most calls of tools in an answer, None for any number."""
    if not body.tools or body.tool_choice == "none":
        return 0
    return 1 if body.parallel_tool_calls is False else None


def answer_form(body: ResponsesRequest) -> AnswerForm | None:
    """What the answer must be; None for any text."""
    choice = body.tool_choice
    if choice is None or choice in ("auto", "none"):
        schema = _schema(body)
        if schema is None:
            return None
        calls = {} if max_calls(body) == 0 else _functions(body, None)
        is_one = max_calls(body) == 1
        return AnswerForm(field="text.format", schema=schema, calls=calls, is_one_call=is_one)
    name = None
    if isinstance(choice, dict):
        name = choice.get("name")
        if choice.get("type") != "function" or not isinstance(name, str):
            raise RequestError("tool_choice is not understood; give type 'function' and a name")
    elif choice != "required":
        raise RequestError(
            f"tool_choice={choice!r:.80} is unknown; give none, auto, required or a tool"
        )
    is_one = name is not None or body.parallel_tool_calls is False
    return AnswerForm(field="tools", calls=_functions(body, name), is_one_call=is_one)


def echoed_fields(body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What a response repeats of its request, with the defaults that were used."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": params.temperature,
        "text": _echoed_text(body),
        "tool_choice": _echoed_choice(body),
        "tools": [_known(tool, _TOOL_FIELDS) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
    }


def _check_labels(body: ResponsesRequest) -> None:
    """What is kept with a response as it was given is small, as the protocol has it."""
    metadata = body.metadata or {}
    if len(metadata) > _MAX_METADATA:
        raise RequestError(f"metadata has {len(metadata)} entries; give at most {_MAX_METADATA}")
    for name, value in metadata.items():
        _check_length(f"a name in metadata, {name!r:.80},", name, _MAX_METADATA_NAME)
        _check_length(f"metadata.{name}", value, _MAX_LABEL)
    for field in ("prompt_cache_key", "safety_identifier", "user"):
        _check_length(field, getattr(body, field) or "", _MAX_LABEL)


def _check_length(field: str, text: str, most: int) -> None:
    if len(text) > most:
        raise RequestError(f"{field} has {len(text)} characters; give at most {most}")


def _echoed_text(body: ResponsesRequest) -> dict[str, Any]:
    """Of `text` what this server has read: the rest would be kept for nothing."""
    form = (body.text or {}).get("format")
    if not isinstance(form, Mapping) or form.get("type") == "text":
        return {"format": {"type": "text"}}
    return {"format": _known(form, _FORMAT_FIELDS)}


def _echoed_choice(body: ResponsesRequest) -> str | dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return "auto"
    return choice if isinstance(choice, str) else _known(choice, _CHOICE_FIELDS)


def _known(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given[name] for name in names if name in given}


def _functions(body: ResponsesRequest, name: str | None) -> dict[str, Mapping[str, Any]]:
    """The schemas of the functions that may be called, by name: of all, or of the one of this name."""
    functions = {
        str(tool.get("name")): tool.get("parameters") or _ANY_OBJECT for tool in body.tools or ()
    }
    if not functions:
        raise RequestError("tool_choice asks for a call, and tools is empty; give tools")
    if name is None:
        return functions
    if name not in functions:
        raise RequestError(f"tool_choice.name={name!r:.80} is none of tools; add it to tools")
    return {name: functions[name]}


def _schema(body: ResponsesRequest) -> Mapping[str, Any] | None:
    wanted = (body.text or {}).get("format")
    if wanted is None:
        return None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _ANY_OBJECT
    schema = wanted.get("schema") if isinstance(wanted, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        raise RequestError(
            "text.format is not understood; give type text, json_object, or json_schema and a schema"
        )
    return schema
