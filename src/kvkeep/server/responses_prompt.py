"""Items of a Responses request become the chat messages that templates know."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvkeep.errors import RequestError
from kvkeep.server.block_fields import content_of, shown, text_field
from kvkeep.server.responses_schemas import InputItem

__all__ = ["chat_tools", "input_items", "item_messages"]

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
# What a part may say of the cache, which the readers of cache fields look for.
_PART_FIELDS = ("kv_cache",)


def input_items(given: str | Sequence[InputItem]) -> list[InputItem]:
    """The items of a request's `input`; text is what the user says."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}] if given else []
    return list(given)


def item_messages(
    items: Iterable[InputItem], before: Iterable[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The chat messages of items; calls belong to the answer they come with.

    `before` are the messages of the conversation so far, whose calls may have their results in the items.
    Raises RequestError for an item that no template could show.
    """
    messages: list[dict[str, Any]] = []
    names = {
        call["id"]: call["function"]["name"]
        for message in before
        for call in message.get("tool_calls", ())
    }
    for number, item in enumerate(items):
        where = f"input.{number}"
        match item.get("type", "message"):
            case "message":
                messages.append(_message(item, where))
            case "function_call":
                call = _call(item, where)
                names[call["id"]] = call["function"]["name"]
                _answer(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append(_result(item, names, where))
            case "reasoning":
                pass  # thoughts of earlier turns are not read again
            case kind:
                raise RequestError(
                    f"{where}.type={shown(kind)} cannot be read here; give messages, function_call "
                    "and function_call_output"
                )
    return messages


def chat_tools(tools: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as templates know them. Raises RequestError for one that a server would have to run."""
    if not tools:
        return None
    return [_tool(tool, f"tools.{number}") for number, tool in enumerate(tools)]


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"{where}.type={shown(tool.get('type'))} is run by other servers; give tools of type "
            "'function', which the client runs"
        )
    parameters = tool.get("parameters")
    return {
        "type": "function",
        "function": {
            "name": text_field(tool, "name", where),
            "description": tool.get("description") or "",
            "parameters": {"type": "object", "properties": {}}
            if parameters is None
            else parameters,
        },
    }


def _message(item: InputItem, where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise RequestError(
            f"{where}.role={shown(role)} is unknown; give user, assistant, system or developer"
        )
    message = {"role": _ROLES[role], "content": _content(item.get("content"), f"{where}.content")}
    return message | {field: item[field] for field in _PART_FIELDS if field in item}


def _content(content: object, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}={shown(content)} is neither text nor a list of parts")
    parts = [_part(part, f"{where}.{number}") for number, part in enumerate(content)]
    return content_of(parts)


def _part(part: object, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise RequestError(
            f"{where}={shown(part)} is not an object; give a part of type input_text"
        )
    if part.get("type") not in _TEXT_PARTS:
        raise RequestError(
            f"{where}.type={shown(part.get('type'))} cannot be read by this model; give input_text"
        )
    kept = {field: part[field] for field in _PART_FIELDS if field in part}
    return {"type": "text", "text": text_field(part, "text", where)} | kept


def _call(item: InputItem, where: str) -> dict[str, Any]:
    arguments = text_field(item, "arguments", where)
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}.arguments={arguments[:80]!r} is not JSON: {error}") from error
    return {
        "id": text_field(item, "call_id", where),
        "type": "function",
        "function": {"name": text_field(item, "name", where), "arguments": read},
    }


def _result(item: InputItem, names: dict[str, str], where: str) -> dict[str, Any]:
    call_id = text_field(item, "call_id", where)
    if call_id not in names:
        raise RequestError(
            f"{where}.call_id={shown(call_id)} is the result of no call of this conversation; send its "
            "function_call before it, or previous_response_id"
        )
    output = _content(item.get("output"), f"{where}.output")
    return {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": output}


def _answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer a call belongs to: the one just before it, or one that has nothing but calls."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]
