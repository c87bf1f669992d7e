"""How models write calls of tools. Which way is a model's own is seen in its chat template.

Hermes, Qwen   <tool_call> {"name": ..., "arguments": {...}} </tool_call>, one behind the other
Llama 3        {"name": ..., "parameters": {...}} as the whole answer, perhaps behind <|python_tag|>
Mistral        [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]; newer [TOOL_CALLS]name[ARGS]{...}
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, Protocol

__all__ = [
    "CallSyntax",
    "CallsRead",
    "HermesSyntax",
    "LlamaSyntax",
    "MistralSyntax",
    "WrittenCall",
    "syntax_of",
]

_TOOL_CALLS, _ARGS = "[TOOL_CALLS]", "[ARGS]"
_ID_LETTERS = 9
# A name and what may be between it and its arguments; more is no call.
_MOST_HEAD = 300
_HEAD = re.compile(r"([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]")


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call as a model wrote it; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallsRead:
    """The calls in the first `length` characters of a text; without calls these are text like any other."""

    calls: tuple[WrittenCall, ...]
    length: int


class CallSyntax(Protocol):
    """One way of writing calls: how they are read from text, and what a grammar writes around arguments."""

    @property
    def marks(self) -> Sequence[str]:
        """Texts of which each begins calls."""
        ...

    @property
    def may_be_bare(self) -> bool:
        """Whether an output that begins with "{" may be a call without a mark."""
        ...

    @property
    def shows_special(self) -> bool:
        """Whether marks are special tokens, which text has only when they are asked for."""
        ...

    @property
    def around(self) -> tuple[Sequence[str], Sequence[str]]:
        """What a grammar writes before the first and behind the last call of an answer."""
        ...

    @property
    def between(self) -> Sequence[str] | None:
        """What it writes between two calls; None where templates take a single one."""
        ...

    def around_arguments(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        """What it writes before and behind the arguments of a call."""
        ...

    def call_id(self) -> str:
        """A new id, as templates take it."""
        ...

    def read(self, text: str, *, is_last: bool) -> CallsRead | None:
        """The calls that begin where `text` does, right behind a mark; None until there is more of it.

        `is_last`: nothing comes behind it, so that the answer is not None.
        """
        ...


@dataclass(frozen=True, slots=True)
class HermesSyntax(CallSyntax):
    """Every call in marks of its own."""

    marks: Sequence[str] = ("<tool_call>",)
    may_be_bare: bool = False
    shows_special: bool = False
    around: tuple[Sequence[str], Sequence[str]] = ((), ())
    between: Sequence[str] | None = ("\n",)
    end: str = "</tool_call>"

    def around_arguments(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        opening = f'\n{{"name": {json.dumps(name)}, "arguments": '
        return (self.marks[0], opening), ("}\n", self.end)

    def call_id(self) -> str:
        return _long_id()

    def read(self, text: str, *, is_last: bool) -> CallsRead | None:
        body, end, _ = text.partition(self.end)
        # The end of a call may have ended the output and so be missing from the text.
        if not end and not is_last:
            return None
        try:
            call = _call(json.loads(body))
        except (ValueError, RecursionError):
            call = None
        return CallsRead(() if call is None else (call,), len(body) + len(end))


@dataclass(frozen=True, slots=True)
class LlamaSyntax(CallSyntax):
    """The answer is a call, with `parameters`. Templates take one in a message; models may write several."""

    marks: Sequence[str] = ("<|python_tag|>",)
    may_be_bare: bool = True
    shows_special: bool = False
    around: tuple[Sequence[str], Sequence[str]] = ((), ())
    between: Sequence[str] | None = None

    def around_arguments(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        return (f'{{"name": {json.dumps(name)}, "parameters": ',), ("}",)

    def call_id(self) -> str:
        return _long_id()

    def read(self, text: str, *, is_last: bool) -> CallsRead | None:
        found = _first_json(text)
        if found is None:
            is_other = text.strip() and not text.lstrip().startswith("{")
            return CallsRead((), len(text)) if is_last or is_other else None
        # JSON may be what was asked for: a call has its parameters.
        has_arguments = isinstance(found.value, dict) and (
            "parameters" in found.value or "arguments" in found.value
        )
        call = _call(found.value) if has_arguments else None
        return CallsRead(() if call is None else (call,), found.end)


@dataclass(frozen=True, slots=True)
class MistralSyntax(CallSyntax):
    """A list of calls behind one mark, or with `has_args` each call behind a mark, its name before `[ARGS]`.

    Both are read, whatever is written in a grammar.
    """

    has_args: bool = False
    marks: Sequence[str] = (_TOOL_CALLS,)
    may_be_bare: bool = False
    shows_special: bool = True

    @property
    def around(self) -> tuple[Sequence[str], Sequence[str]]:
        return ((), ()) if self.has_args else ((_TOOL_CALLS, " ["), ("]",))

    @property
    def between(self) -> Sequence[str] | None:
        return () if self.has_args else (", ",)

    def around_arguments(self, name: str) -> tuple[Sequence[str], Sequence[str]]:
        if self.has_args:
            return (_TOOL_CALLS, name, _ARGS), ()
        return (f'{{"name": {json.dumps(name)}, "arguments": ',), ("}",)

    def call_id(self) -> str:
        """Templates want nine letters."""
        return token_hex(_ID_LETTERS)[:_ID_LETTERS]

    def read(self, text: str, *, is_last: bool) -> CallsRead | None:
        body = text.lstrip()
        offset = len(text) - len(body)
        if not body:
            return CallsRead((), len(text)) if is_last else None
        found = _listed(body, is_last=is_last) if body.startswith("[") else _named(body)
        if found is not None:
            return CallsRead(found.calls, offset + found.length)
        may_go_on = body.startswith("[") or _ARGS in body or len(body) < _MOST_HEAD
        return None if may_go_on and not is_last else CallsRead((), len(text))


def syntax_of(template: object) -> CallSyntax:
    """The syntax that a chat template shows; that of Hermes where it shows none that is known here."""
    text = str(template)
    if _TOOL_CALLS in text:
        return MistralSyntax(has_args=_ARGS in text)
    if "<tool_call>" not in text and '"parameters": ' in text:
        return LlamaSyntax()
    return HermesSyntax()


def _listed(body: str, *, is_last: bool) -> CallsRead | None:
    found = _first_json(body)
    if found is None:
        return _begun(body) if is_last else None
    calls = [_call(one) for one in found.value]
    known = tuple(call for call in calls if call is not None)
    return CallsRead(known if len(known) == len(calls) else (), found.end)


def _begun(body: str) -> CallsRead | None:
    """The calls of a list that has no end, as an output that was cut off; None without any."""
    calls, rest = [], body[1:]
    while (found := _first_json(rest)) is not None:
        call = _call(found.value)
        if call is None:
            break
        calls.append(call)
        rest = rest[found.end :].lstrip().removeprefix(",")
    return CallsRead(tuple(calls), len(body) - len(rest)) if calls else None


def _named(body: str) -> CallsRead | None:
    head = _HEAD.match(body)
    found = None if head is None else _first_json(body[head.end() :])
    if head is None or found is None:
        return None
    calls = (_written(head[1], found.value),) if isinstance(found.value, dict) else ()
    return CallsRead(calls, head.end() + found.end)


@dataclass(frozen=True, slots=True)
class _Json:
    """A value, and where in the text behind it the rest begins."""

    value: Any  # any: whatever JSON can say
    end: int


def _first_json(text: str) -> _Json | None:
    """The JSON that a text begins with, blanks aside; None where there is none, or not yet all of it."""
    start = len(text) - len(text.lstrip())
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return _Json(value, end)


def _call(value: object) -> WrittenCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return _written(value["name"], value.get("arguments", value.get("parameters", {})))


def _written(name: str, arguments: object) -> WrittenCall:
    if not isinstance(arguments, str):
        # As a template writes it when the call comes back, so that the cache still fits.
        arguments = json.dumps(arguments, ensure_ascii=False)
    return WrittenCall(name, arguments)


def _long_id() -> str:
    return f"call_{token_hex(12)}"
