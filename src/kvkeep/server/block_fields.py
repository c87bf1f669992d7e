"""Fields of the blocks and items that prompts of the newer protocols are made of."""

from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any

from kvkeep.errors import RequestError

__all__ = ["content_of", "shown", "text_field"]

_LONGEST_SHOWN = 80


def text_field(block: Mapping[str, Any], field: str, where: str) -> str:
    """A field that must be text. Raises RequestError that names its place, which begins with `where`."""
    value = block.get(field)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{field}={shown(value)} is not text; give a string")
    return value


def shown(value: object) -> str:
    """A value in a message; of nested ones the beginning, for they may be of any size and depth."""
    written = shortened(value) if isinstance(value, list | dict) else repr(value)
    return written[:_LONGEST_SHOWN]


def content_of(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """The content of a chat message; one part that is only text is given as text."""
    if not parts:
        return ""
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        return str(parts[0]["text"])
    return list(parts)
