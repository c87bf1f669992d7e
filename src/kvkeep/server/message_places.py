"""Where in a rendered conversation each message begins, by its text.

    <|im_start|>system↵Be brief.<|im_end|>↵<|im_start|>user↵Hello<|im_end|>↵
                      └ content 0 ┘└── between ──────────┘└ content 1
                                                └ message 1 begins: found once by rendering message 0 alone

A place that cannot be told exactly is never too late: what is said to begin there lies behind it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["MessagePlace", "MessagePlaces"]

# What stands between two contents is nearly always one of a few texts.
_MAX_LEARNT = 256
_MAX_LEARNT_CHARACTERS = 200
# Renderings for one conversation; what they cost grows with its length.
_MAX_RENDERINGS = 8


@dataclass(frozen=True, slots=True)
class MessagePlace:
    """First character of a message, and of each of its parts."""

    start: int
    part_starts: tuple[int, ...]


class MessagePlaces:
    """Finds places, and learns how a template begins a message. May be used by several threads at once."""

    def __init__(self) -> None:
        self._between_to_cut: dict[str, int] = {}

    def find(
        self,
        rendered: str,
        contents: Sequence[Sequence[str]],
        render_first: Callable[[int], str | None],
    ) -> list[MessagePlace]:
        """The places of messages whose text parts are `contents`, in `rendered`.

        `render_first(n)` renders the first n messages alone; None where the template refuses that.
        """
        found: list[MessagePlace] = []
        cursor = 0
        num_left = _MAX_RENDERINGS
        for number, parts in enumerate(contents):
            span = _find_parts(rendered, parts, cursor)
            start = 0
            if number:
                between = rendered[cursor : span.start] if span.is_shown else None
                cut = None if between is None else self._between_to_cut.get(between)
                if cut is None and num_left > 0:
                    num_left -= 1
                    cut = _cut(rendered, cursor, between, render_first(number))
                    self._learn(between, cut)
                start = span.start if cut is None else cursor + cut
            found.append(MessagePlace(start, tuple(max(start, at) for at in span.part_starts)))
            cursor = max(start, span.stop)
        return found

    def _learn(self, between: str | None, cut: int | None) -> None:
        if between is None or cut is None or len(between) > _MAX_LEARNT_CHARACTERS:
            return
        if len(self._between_to_cut) >= _MAX_LEARNT:
            self._between_to_cut.clear()
        self._between_to_cut[between] = cut


def _cut(rendered: str, cursor: int, between: str | None, before: str | None) -> int | None:
    """Characters behind `cursor` that still belong to `before`, the rendering of all messages before."""
    if before is None or not rendered.startswith(before):
        return None
    cut = len(before) - cursor
    # A message that is not shown may begin anywhere behind.
    is_sound = cut >= 0 and (between is None or cut <= len(between))
    return cut if is_sound else None


@dataclass(frozen=True, slots=True)
class _Parts:
    start: int
    stop: int
    part_starts: tuple[int, ...]
    is_shown: bool


def _find_parts(rendered: str, parts: Sequence[str], cursor: int) -> _Parts:
    """Where the parts stand at the earliest. What is not found (a template may leave it out) is empty."""
    starts: list[int] = []
    shown: list[int] = []
    for part in parts:
        text = part.strip()  # templates trim
        at = rendered.find(text, cursor) if text else -1
        if at >= 0:
            shown.append(at)
            starts.append(at)
            cursor = at + len(text)
        else:
            starts.append(cursor)
    return _Parts(
        start=shown[0] if shown else cursor,
        stop=cursor,
        part_starts=tuple(starts),
        is_shown=bool(shown),
    )
