"""A request's text, in the order in which chat templates write it, whatever protocol it speaks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["PROMPT_FIELDS", "Part", "PartKind", "parts_of"]

# The fields of a request that make its prompt, of all protocols.
PROMPT_FIELDS = ("messages", "prompt", "input", "system", "instructions", "tools", "token_ids")


class PartKind(StrEnum):
    """What a part is to the requests that follow."""

    FIXED = "fixed"  # meant to be the same in every request: tools, system text, instructions
    PAST = "past"  # a message that was sent before
    NEWEST = "newest"  # the message that this request adds
    WHOLE = "whole"  # a plain prompt, of which nobody says what is new


@dataclass(frozen=True, slots=True)
class Part:
    """One text; `where` is its place in the request, as in messages[0].content."""

    where: str
    kind: PartKind
    text: str


def parts_of(request: Mapping[str, object]) -> list[Part]:
    """The texts of a chat, completions, messages or responses request; what is no text is left out."""
    parts: list[Part] = []
    tools = request.get("tools")
    if isinstance(tools, list) and tools:
        # In the order of keys as sent: templates write them so.
        parts += [
            Part(f"tools[{at}]", PartKind.FIXED, json.dumps(tool)) for at, tool in enumerate(tools)
        ]
    for name in ("system", "instructions"):
        parts += [
            Part(where, PartKind.FIXED, text) for where, text in _texts(name, request.get(name))
        ]
    for name in ("messages", "input"):
        messages = request.get(name)
        if isinstance(messages, str):
            parts.append(Part(name, PartKind.NEWEST, messages))
        elif isinstance(messages, list):
            parts += _message_parts(name, messages)
    prompt = request.get("prompt")
    if isinstance(prompt, str):
        parts.append(Part("prompt", PartKind.WHOLE, prompt))
    elif isinstance(prompt, list):
        texts = [(at, text) for at, text in enumerate(prompt) if isinstance(text, str)]
        parts += [Part(f"prompt[{at}]", PartKind.WHOLE, text) for at, text in texts]
    return parts


def _message_parts(name: str, messages: Sequence[object]) -> list[Part]:
    parts: list[Part] = []
    for at, message in enumerate(messages):
        if not isinstance(message, Mapping):
            continue
        kind = PartKind.NEWEST if at == len(messages) - 1 else PartKind.PAST
        if message.get("role") in ("system", "developer"):
            kind = PartKind.FIXED
        texts = _texts(f"{name}[{at}].content", message.get("content"))
        parts += [Part(where, kind, text) for where, text in texts]
    return parts


def _texts(where: str, content: object) -> list[tuple[str, str]]:
    if isinstance(content, str):
        return [(where, content)]
    if not isinstance(content, list):
        return []
    found = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            found.append((f"{where}[{at}]", text))
    return found
