"""Two requests of one program: what of the text that should be the same is not."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.cache.explain.lint_parts import Part, PartKind

__all__ = ["Difference", "differences"]

_SNIPPET_CHARS = 40


@dataclass(frozen=True, slots=True)
class Difference:
    """Part number `number` of the newer request differs from character `start` on."""

    number: int
    start: int
    what: str
    text: str
    earlier_text: str
    remedy: str


def differences(earlier: Sequence[Part], parts: Sequence[Part]) -> list[Difference]:
    """The first difference in what both requests have, and whether only an order changed; at most one.

    The newest messages are meant to differ. What follows a difference is lost with it.
    """
    reordered = _reordered_tools(earlier, parts)
    if reordered is not None:
        return [reordered]
    where_to_earlier = {part.where: part for part in earlier}
    for number, part in enumerate(parts):
        before = where_to_earlier.get(part.where)
        is_meant = part.kind in (PartKind.NEWEST, PartKind.WHOLE)
        if before is None or is_meant or before.text == part.text:
            continue
        if before.kind is PartKind.NEWEST and part.text.startswith(before.text):
            continue
        return [_difference(number, before, part)]
    return []


def _reordered_tools(earlier: Sequence[Part], parts: Sequence[Part]) -> Difference | None:
    before = [part.text for part in earlier if part.where.startswith("tools[")]
    after = [part.text for part in parts if part.where.startswith("tools[")]
    if before == after or Counter(map(_sorted_keys, before)) != Counter(map(_sorted_keys, after)):
        return None
    number = next(at for at, text in enumerate(after) if text != before[at])
    if _sorted_keys(before[number]) == _sorted_keys(after[number]):
        return None
    return Difference(
        number,
        0,
        "the order of the tools changes",
        after[number][:_SNIPPET_CHARS],
        before[number][:_SNIPPET_CHARS],
        "sort the tools by name before they are sent",
    )


def _difference(number: int, before: Part, part: Part) -> Difference:
    pairs = enumerate(zip(before.text, part.text, strict=False))
    shorter = min(len(before.text), len(part.text))
    start = next((at for at, (one, other) in pairs if one != other), shorter)
    what = "text that changes between requests"
    remedy = "move what changes behind what stays the same, into the newest message"
    if _sorted_keys(before.text) == _sorted_keys(part.text):
        what = "the order of keys in JSON changes"
        remedy = "write JSON with sorted keys"
    elif Counter(before.text.splitlines()) == Counter(part.text.splitlines()):
        what = "the order of lines changes"
        remedy = "sort what is listed before it is written into the text"
    return Difference(
        number,
        start,
        what,
        part.text[start : start + _SNIPPET_CHARS],
        before.text[start : start + _SNIPPET_CHARS],
        remedy,
    )


def _sorted_keys(text: str) -> str:
    """JSON text with its keys in order; other text as it is."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text
