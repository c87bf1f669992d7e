"""Text and calls of tools, as tests compare them."""

from collections.abc import Iterable

from kvkeep.server.tool_calls import ToolCall


def shown(parts: Iterable[str | ToolCall]) -> list[str]:
    """Text joined, calls as name and arguments."""
    found: list[str] = []
    is_text = False
    for part in parts:
        if isinstance(part, ToolCall):
            found.append(f"{part.name}({part.arguments})")
        elif is_text:
            found[-1] += part
        else:
            found.append(part)
        is_text = isinstance(part, str)
    return found
