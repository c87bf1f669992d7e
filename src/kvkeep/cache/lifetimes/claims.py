"""What one request puts on the blocks that it uses and computes."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

from kvkeep.blocks import TokenChain
from kvkeep.cache.lifetimes.labels import (
    DEFAULT_PRIORITY,
    ContextId,
    Labels,
    PinId,
    SessionId,
)
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.spec import BlockKey

__all__ = ["Claim", "TagPart", "pin_name", "tag_parts"]


@dataclass(frozen=True, slots=True)
class TagPart:
    """The tags of block numbers from `first` on, up to the next part's."""

    first: int
    tags: frozenset[str]


def pin_name(options: CacheOptions, chain: TokenChain) -> PinId:
    """The pin of a request: as it calls that, else after the content of its full blocks."""
    if isinstance(options.pin, str):
        return PinId(options.pin)
    return PinId(f"prompt:{chain.keys[-1].hex()[:16]}")


def tag_parts(spans: Sequence[TagSpan], block_size: int) -> tuple[TagPart, ...]:
    """Which tags hold from which block number on; the first part begins at 0."""
    parts = [TagPart(0, frozenset())]
    for span in sorted(spans, key=lambda one: one.start):
        first, tags = span.start // block_size, parts[-1].tags | {span.tag}
        if parts[-1].first == first:
            parts[-1] = TagPart(first, tags)
        else:
            parts.append(TagPart(first, tags))
    return tuple(parts)


@dataclass(eq=False, kw_only=True, slots=True)
class Claim:
    """One request's part in the life of its blocks. Made by `Lifetimes.open`.

    `is_void` once what it depends on was purged, or its session closed: from then on it puts labels on
    nothing, and its request publishes nothing. `pin` keeps the first `num_pinned` blocks, from when the first
    of them is there (`has_pinned`); `left_context` is what its session turns away from. With `is_kept_out` a
    request never publishes (write=False, or a life of 0 seconds); with `is_silent` (write=False) its use of
    others' blocks leaves no trace either.
    """

    namespace: BlockKey
    session: SessionId | None = None
    context: str | None = None
    left_context: str | None = None
    parts: tuple[TagPart, ...] = (TagPart(0, frozenset()),)
    ttl_s: float = inf
    counts_from_first: bool = False
    priority: int = DEFAULT_PRIORITY
    pin: PinId | None = None
    num_pinned: int = 0
    has_pinned: bool = False
    is_kept_out: bool = False
    is_silent: bool = False
    is_void: bool = False
    is_open: bool = True
    has_begun: bool = False

    @property
    def publishes(self) -> bool:
        """Whether blocks of the request may be found by others."""
        return not self.is_kept_out and not self.is_void

    @property
    def slides(self) -> bool:
        """Whether every use puts off the end."""
        return self.ttl_s < inf and not self.counts_from_first

    @property
    def tags(self) -> frozenset[str]:
        """All tags of the request."""
        return self.parts[-1].tags

    def tags_of(self, number: int) -> frozenset[str]:
        """The tags of a block number."""
        return self.parts[bisect_right(self.parts, number, key=lambda part: part.first) - 1].tags

    def on(
        self, tags: frozenset[str], now_s: float, *, is_new: bool
    ) -> Callable[[Labels | None], Labels]:
        """What makes of a block's labels those that it has when this request uses it now.

        With `is_new` the request has computed the block: labels that have expired are not built upon.
        """

        def claim(old: Labels | None) -> Labels:
            if old is not None and (is_new and old.ends_at <= now_s):
                old = None
            return self._claimed(old, tags, now_s)

        return claim

    def _claimed(self, old: Labels | None, tags: frozenset[str], now_s: float) -> Labels:
        name = None if self.session is None else self.session.name
        sessions = frozenset() if name is None else frozenset((name,))
        contexts: frozenset[ContextId] = frozenset()
        if name is not None and self.context is not None:
            contexts = frozenset((ContextId(name, self.context),))
        if old is None:
            return Labels(
                namespace=self.namespace,
                sessions=sessions,
                is_shared=name is None,
                tags=tags,
                expires_at=now_s + self.ttl_s,
                created_at=now_s,
                priority=self.priority,
                contexts=contexts,
            )
        begins_at = old.created_at if self.counts_from_first else now_s
        return replace(
            old,
            sessions=old.sessions | sessions,
            is_shared=old.is_shared or name is None,
            tags=old.joined(tags),
            expires_at=max(old.expires_at, begins_at + self.ttl_s),
            priority=max(old.priority, self.priority),
            contexts=old.contexts | contexts,
        ).bounded()
