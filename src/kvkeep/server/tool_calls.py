"""Calls of tools in the text of a model, as its output comes, and in messages that come back."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep.errors import RequestError
from kvkeep.server.block_fields import shown
from kvkeep.server.call_syntax import CallsRead, CallSyntax

__all__ = ["ToolCall", "ToolCallParser", "with_parsed_arguments"]

# What models write between calls that have no marks, blanks aside.
_BARE_SEPARATOR = ";"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text, as clients expect it."""

    call_id: str
    name: str
    arguments: str


class ToolCallParser:
    """Splits the text of one output, as it comes, into plain text and calls in this syntax.

    A call comes out whole, when it ends. What looks like one and is none comes out as text, and so does
    what has not ended with the output. Blanks around calls are left out. Behind `max_calls` nothing comes.
    """

    def __init__(self, syntax: CallSyntax, *, max_calls: int | None = None) -> None:
        self._syntax = syntax
        self._max_calls = max_calls
        self._held = ""
        self._is_inside = False
        self._before = ""  # blanks and the mark that we are behind
        self._may_be_bare = syntax.may_be_bare
        self.num_calls = 0

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take text; returns what is certain now, in order."""
        self._held += text
        found = self._advance(is_last=False)
        if not self._is_inside and not self._is_full:
            found += self._release()
        return found

    def finish(self) -> list[str | ToolCall]:
        """The rest; no text follows."""
        found = self._advance(is_last=True)
        held, self._held = self._held, ""
        if self._is_full or (self.num_calls and not held.strip(self._blanks)):
            return found
        return [*found, held] if held else found

    @property
    def _is_full(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    @property
    def _blanks(self) -> str:
        """What is left out behind a call."""
        return " \t\r\n" + (_BARE_SEPARATOR if self._may_be_bare and self.num_calls else "")

    def _advance(self, *, is_last: bool) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while not self._is_full:
            if not self._is_inside and not self._enter(found):
                break
            read = self._syntax.read(self._held, is_last=is_last)
            if read is None:
                break
            found += self._take(read)
        return found

    def _enter(self, found: list[str | ToolCall]) -> bool:
        """Go behind the next mark, if there is one; text before it goes to `found`."""
        bare = self._held.lstrip(self._blanks)
        places = [(self._held.find(mark), mark) for mark in self._syntax.marks]
        at, mark = min(((at, mark) for at, mark in places if at >= 0), default=(-1, ""))
        if self._may_be_bare and bare.startswith("{"):
            at, mark = len(self._held) - len(bare), ""
        if at < 0:
            return False
        text = self._held[:at].rstrip(self._blanks)
        if text:
            found.append(text)
        self._before = self._held[len(text) : at] + mark
        self._held = self._held[at + len(mark) :]
        self._is_inside = True
        return True

    def _take(self, read: CallsRead) -> list[str | ToolCall]:
        self._is_inside = False
        body, self._held = self._held[: read.length], self._held[read.length :]
        if not read.calls:
            self._may_be_bare = False
            return [self._before + body]
        room = None if self._max_calls is None else self._max_calls - self.num_calls
        calls = read.calls[:room]
        self.num_calls += len(calls)
        return [
            ToolCall(call_id=self._syntax.call_id(), name=call.name, arguments=call.arguments)
            for call in calls
        ]

    def _release(self) -> list[str | ToolCall]:
        """The held text up to where calls may begin, and without the blanks before that."""
        num_held = max(_overlap(self._held, mark) for mark in self._syntax.marks)
        free = self._held[: len(self._held) - num_held].rstrip(self._blanks)
        self._held = self._held[len(free) :]
        if free:
            self._may_be_bare = False
        return [free] if free else []


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of the text begin, but do not end, the mark."""
    most = min(len(text), len(mark) - 1)
    return next(length for length in range(most, -1, -1) if text.endswith(mark[:length]))


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
