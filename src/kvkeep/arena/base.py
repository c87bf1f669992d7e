"""The contract of an arena: the device memory of one KV group, by BlockId.

Legend: T tokens, W elements of a token's keys or values in one layer, E elements of a block, as the layout
counts them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvkeep.arena.slots import Slots
from kvkeep.spec import BlockId, GroupSpec

__all__ = ["GroupArena", "Layout"]


class Layout(Protocol):
    """The order of bytes inside a block; `name` is part of what tiers store."""

    @property
    def name(self) -> str:
        """The layout and its version."""
        ...

    @property
    def spec(self) -> GroupSpec:
        """The group whose blocks these are."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        ...

    def to_canonical(self, block_E: Tensor) -> Tensor:
        """A block's elements in canonical order: docs/formats.md."""
        ...

    def from_canonical(self, block_E: Tensor) -> Tensor:
        """The inverse of `to_canonical`."""
        ...


class GroupArena(Protocol):
    """Blocks of K/V in one allocation; `layer` below counts within the group."""

    num_blocks: int

    @property
    def layout(self) -> Layout:
        """Where everything lies inside a block."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        ...

    def is_exact(self, layer: int) -> bool:
        """Whether what is read is what was written, to the last bit."""
        ...

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Put one layer's keys and values of T tokens into their slots; [T, heads, dim] will do as well.

        The caller guarantees that the slots differ.
        """
        ...

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """One layer's keys [T, k_width] and values [T, v_width] of T tokens, in the order of `slots`."""
        ...

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read` in memory that the next `borrow` may overwrite."""
        ...

    def block(self, block: BlockId) -> Tensor:
        """All elements of a block, shape [E], as they lie: a view."""
        ...

    def fill(self, blocks: Sequence[BlockId], value: float) -> None:
        """Make every key and value of the blocks `value`; NaN reaches metadata as well."""
        ...
