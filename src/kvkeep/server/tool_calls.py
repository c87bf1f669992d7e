"""Calls of tools in the text of a model: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

It is what Hermes and Qwen models write, and what their chat templates show them of earlier calls.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from kvkeep.errors import RequestError
from kvkeep.server.block_fields import shown

__all__ = ["ToolCall", "ToolCallParser", "with_parsed_arguments"]

_BEGIN = "<tool_call>"
_END = "</tool_call>"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text, as clients expect it."""

    call_id: str
    name: str
    arguments: str


class ToolCallParser:
    """Splits the text of one output, as it comes, into plain text and calls.

    A call comes out whole, when it ends. What looks like one and is none comes out as text, and so does
    what has not ended with the output. Blanks around calls are left out. Behind `max_calls` nothing comes.
    """

    def __init__(self, *, max_calls: int | None = None) -> None:
        self._max_calls = max_calls
        self._held = ""
        self._blanks = ""  # before the mark that we are behind
        self._is_inside = False
        self.num_calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take text; returns what is certain now, in order."""
        self._held += text
        found: list[str | ToolCall] = []
        while not self._is_full:
            before, mark, behind = self._held.partition(_END if self._is_inside else _BEGIN)
            if not mark:
                break
            self._held = behind
            found += self._call(before, _END) if self._is_inside else self._enter(before)
        if not self._is_inside and not self._is_full:
            found += self._release()
        return found

    def finish(self) -> list[str | ToolCall]:
        """The rest; no text follows."""
        held, self._held = self._held, ""
        if self._is_full:
            return []
        if self._is_inside:
            # The end of a call may have ended the output and so be missing from the text.
            return self._call(held, "")
        return [held] if held and (held.strip() or not self.num_calls) else []

    @property
    def _is_full(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def _enter(self, before: str) -> list[str | ToolCall]:
        self._is_inside = True
        text = before.rstrip()
        self._blanks = before[len(text) :]
        return [text] if text else []

    def _call(self, body: str, end: str) -> list[str | ToolCall]:
        self._is_inside = False
        call = _parsed(body)
        if call is None:
            return [self._blanks + _BEGIN + body + end]
        self.num_calls += 1
        return [call]

    def _release(self) -> list[str | ToolCall]:
        """The held text up to where a call may begin, and without the blanks before that."""
        num_held = next(
            n
            for n in range(min(len(self._held), len(_BEGIN) - 1), -1, -1)
            if self._held.endswith(_BEGIN[:n])
        )
        free = self._held[: len(self._held) - num_held].rstrip()
        self._held = self._held[len(free) :]
        return [free] if free else []


def with_parsed_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of an assistant as templates take it: arguments of calls are objects, not JSON text."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RequestError(
            f"messages.tool_calls={shown(calls)} is no list; give the calls of the answer"
        )
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(call, Mapping)
        or not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
    ):
        raise RequestError(
            f"messages.tool_calls={shown(call)} names no function; send the call back as it came"
        )
    return {**call, "function": {**function, "arguments": _object(function.get("arguments"))}}


def _object(arguments: object) -> object:
    """What JSON text stands for; text that is no JSON stays text, which most templates take too."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments


def _parsed(body: str) -> ToolCall | None:
    """The call that `body` writes, if it does."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        # As a template writes it when the call comes back, so that the cache still fits.
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call_id=f"call_{token_hex(12)}", name=call["name"], arguments=arguments)
