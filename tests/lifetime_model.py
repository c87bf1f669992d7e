"""Blocks and their lives as a plain model, to compare a cache with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from kvkeep.config import CacheOptions
from tests.lifetime_books import SIZE, Clock

__all__ = ["Key", "LifetimeModel", "Mark"]

# The tenant and the tokens from the first to the block's last.
Key = tuple[str, tuple[int, ...]]


@dataclass
class Mark:
    """What the model says of a block."""

    created: float
    expires: float
    used: float | None
    sessions: set[str] = field(default_factory=set)
    is_shared: bool = False
    tags: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)

    def is_own(self, sessions: Sequence[str]) -> bool:
        """Whether none but these sessions use it."""
        return bool(self.sessions) and not self.is_shared and self.sessions <= set(sessions)


class LifetimeModel:
    """What requests are to find, and why."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.marks: dict[Key, Mark] = {}
        self.sessions: set[tuple[str, str]] = set()
        self.pins: dict[str, str] = {}

    def blocks(self, salt: str, prompt: Sequence[int]) -> list[Key]:
        """The full blocks of a prompt."""
        ends = range(SIZE, len(prompt) + 1, SIZE)
        return [(salt, tuple(prompt[:end])) for end in ends]

    def is_alive(self, key: Key) -> bool:
        """Whether a request is to find the block."""
        mark = self.marks.get(key)
        return mark is not None and (bool(mark.pins) or mark.expires > self.clock.now_s)

    def alive(self) -> dict[Key, Mark]:
        """All blocks that requests are to find."""
        return {key: mark for key, mark in self.marks.items() if self.is_alive(key)}

    def use(self, salt: str, prompt: Sequence[int], options: CacheOptions) -> None:
        """What a request does to its blocks."""
        now_s, ttl_s = self.clock.now_s, options.ttl_s
        life_s = inf if ttl_s is None else ttl_s
        for number, key in enumerate(self.blocks(salt, prompt)):
            tags = {one.tag for one in options.tag_spans if one.start // SIZE <= number}
            is_known = self.is_alive(key)
            if is_known:
                self.marks[key].used = now_s
            if not options.write or (not is_known and life_s == 0):
                continue
            if not is_known:
                self.marks[key] = Mark(now_s, now_s + life_s, now_s)
            mark = self.marks[key]
            begins = mark.created if options.ttl_counts_from == "first" else now_s
            mark.expires = max(mark.expires, begins + life_s)
            mark.tags |= tags
            if options.session is None:
                mark.is_shared = True
            else:
                mark.sessions.add(options.session)

    def forget(self, keys: Sequence[Key]) -> None:
        """The model's part of a purge."""
        for key in keys:
            del self.marks[key]
