"""Shapes and ids: what a model's KV looks like, before any memory exists."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

__all__ = [
    "BlockId",
    "BlockKey",
    "GroupSpec",
    "KVSpec",
    "LayerKind",
    "RequestId",
    "Span",
]

# A place on the device, reused all the time. Never compare it with content.
BlockId = NewType("BlockId", int)
# The name of content, for ever: see docs/formats.md.
BlockKey = NewType("BlockKey", bytes)
RequestId = NewType("RequestId", int)


class LayerKind(StrEnum):
    """Which earlier positions a query at position p reads."""

    FULL = "full"  # all of them
    SLIDING = "sliding"  # the last `window` positions, p included
    CHUNKED = "chunked"  # those of its own chunk of `window` positions
    RECURRENT = "recurrent"  # none: a state is carried instead


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions `start <= p < stop` of one request."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """Layers that share shape and lifetime rule; each group has an arena of its own.

    `k_heads * k_dim` and `v_heads * v_dim` are the elements a token stores per layer. MLA models store a
    latent as "keys" and the rotated part as "values", so the two widths may differ. A recurrent group
    has one state per block in place of tokens: `state_bytes`, and no widths.
    """

    name: str
    kind: LayerKind
    layers: tuple[int, ...]
    window: int | None = None
    k_heads: int = 0
    k_dim: int = 0
    v_heads: int = 0
    v_dim: int = 0
    itemsize: int = 0
    state_bytes: int = 0

    @property
    def k_width(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.k_heads * self.k_dim

    @property
    def v_width(self) -> int:
        """Elements of one token's values in one layer."""
        return self.v_heads * self.v_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token takes in all layers of the group."""
        return len(self.layers) * (self.k_width + self.v_width) * self.itemsize

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: `block_size` tokens, or one recurrent state."""
        if self.kind is LayerKind.RECURRENT:
            return self.state_bytes
        return block_size * self.bytes_per_token

    def first_needed(self, position: int) -> int:
        """The earliest position that a query at `position` reads."""
        match self.kind:
            case LayerKind.FULL:
                return 0
            case LayerKind.SLIDING:
                assert self.window is not None
                return max(0, position - self.window + 1)
            case LayerKind.CHUNKED:
                assert self.window is not None
                return position - position % self.window
            case LayerKind.RECURRENT:
                return position


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSpec:
    """Everything about a model's KV that the cache must know."""

    groups: tuple[GroupSpec, ...]
    block_size: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token takes in all groups (recurrent states not counted)."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry a state that only a whole run of tokens can rebuild."""
        return any(group.kind is LayerKind.RECURRENT for group in self.groups)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens occupy, the open tail included."""
        return -(-num_tokens // self.block_size)

    def block_bytes(self) -> int:
        """Bytes of one block in every group."""
        return sum(group.block_bytes(self.block_size) for group in self.groups)


def merge_spans(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Sorted spans with touching neighbours joined."""
    merged: list[Span] = []
    for span in spans:
        if merged and merged[-1].stop == span.start:
            merged[-1] = Span(merged[-1].start, span.stop)
        else:
            merged.append(span)
    return tuple(merged)
