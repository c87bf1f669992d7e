"""Prompts and conversations as callers give them; what is none is refused with its place and the remedy."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvkeep.errors import RequestError

__all__ = [
    "Message",
    "Prompt",
    "check_messages",
    "check_prompt",
    "given_prompts",
    "is_conversation",
]

Prompt = str | Sequence[int]
Message = Mapping[str, Any]  # any: a chat template decides what a message may hold
# Whose messages may be calls of tools alone.
_ANSWERER = "assistant"


def given_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of it, many as they are. Raises RequestError for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    check_prompt("prompts", prompts)
    many = list(prompts)
    if many and isinstance(many[0], int):
        return [prompts]  # type: ignore[list-item]  # one prompt of token ids
    for number, prompt in enumerate(many):
        check_prompt(f"prompts[{number}]", prompt)
    return many  # type: ignore[return-value]


def check_prompt(field: str, prompt: object) -> None:
    """Raise RequestError for what can be neither text nor token ids."""
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"{field}={prompt!r:.80} is neither text nor token ids; give a string or a list of ids, and "
            "messages to chat"
        )


def is_conversation(prompt: object) -> bool:
    """Whether it is messages, not text or token ids."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return len(prompt) > 0 and isinstance(prompt[0], Mapping)


def check_messages(messages: object) -> None:
    """Raise RequestError for what is no conversation, with the message and the field that are wrong."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages={messages!r:.80} is no list of messages; give "
            '[{"role": "user", "content": "..."}], or plain text to generate'
        )
    if not messages:
        raise RequestError("messages is empty; give at least one")
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)


def _check_message(where: str, message: object) -> None:
    if not isinstance(message, Mapping):
        raise RequestError(
            f'{where}={message!r:.80} is no message; give {{"role": "user", "content": "..."}}'
        )
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(
            f'{where}.role={role!r:.80} is no role; give "system", "user" or "assistant"'
        )
    if message.get("content") is None and role != _ANSWERER:
        raise RequestError(f"{where}.content=None is no text; give text")
