"""The blocks of a group whose first blocks lie apart, in the model's dtype: two WordArenas as one.

Legend: T tokens, F those of them in first blocks, W elements of a token's keys or values in one layer, E
elements of a block.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvkeep.arena.slots import Slots
from kvkeep.arena.word_layout import WordLayout
from kvkeep.arena.words import WordArena
from kvkeep.spec import BlockId

__all__ = ["SplitArena"]

_Read = Callable[[int, Slots], tuple[Tensor, Tensor]]


class SplitArena:
    """A GroupArena: ids from `rest.num_blocks` on are the blocks of `first`, the others those of `rest`."""

    def __init__(self, rest: WordArena, first: WordArena) -> None:
        self.rest = rest
        self.first = first
        self.num_blocks = rest.num_blocks + first.num_blocks

    @property
    def layout(self) -> WordLayout:
        """Where everything lies inside a block that is no first block; `first` has a layout of its own."""
        return self.rest.layout

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.rest.num_bytes + self.first.num_bytes

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.rest.device

    def is_exact(self, layer: int) -> bool:
        """Whether what is read is what was written in all blocks."""
        return self.rest.is_exact(layer)

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Put one layer's keys and values of T tokens into their slots; [T, heads, dim] will do as well."""
        is_first_T = slots.blocks_T >= self.rest.num_blocks
        if not is_first_T.any():
            self.rest.write(layer, slots, k_TW, v_TW)
            return
        for arena, is_own_T, begin in (
            (self.rest, ~is_first_T, 0),
            (self.first, is_first_T, self.rest.num_blocks),
        ):
            own = Slots(slots.blocks_T[is_own_T] - begin, slots.offsets_T[is_own_T])
            if len(own.blocks_T):
                arena.write(layer, own, k_TW[is_own_T], v_TW[is_own_T])

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """One layer's keys [T, k_width] and values [T, v_width] of T tokens, in the order of `slots`."""
        return self._read(self.rest.read, layer, slots)

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read` in memory that the next `borrow` may overwrite."""
        return self._read(self.rest.borrow, layer, slots)

    def block(self, block: BlockId) -> Tensor:
        """All elements of a block, shape [E], as they lie: a view."""
        arena, own = self._locate(block)
        return arena.block(own)

    def fill(self, blocks: Sequence[BlockId], value: float) -> None:
        """Make every key and value `value`, as far as the formats hold it; NaN is written to every byte."""
        for block in blocks:
            arena, own = self._locate(block)
            arena.fill([own], value)

    def _locate(self, block: BlockId) -> tuple[WordArena, BlockId]:
        num_rest = self.rest.num_blocks
        if block < num_rest:
            return self.rest, block
        return self.first, BlockId(block - num_rest)

    def _read(self, read_rest: _Read, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        num_rest = self.rest.num_blocks
        first_F = (slots.blocks_T >= num_rest).nonzero().squeeze(1)
        if not len(first_F):
            return read_rest(layer, slots)
        # All in one go: the rows of first blocks come from anywhere, and are then overwritten.
        anywhere = Slots(slots.blocks_T.clamp(max=num_rest - 1), slots.offsets_T)
        k_TW, v_TW = read_rest(layer, anywhere)
        own = Slots(slots.blocks_T[first_F] - num_rest, slots.offsets_T[first_F])
        k_FW, v_FW = self.first.borrow(layer, own)
        k_TW[first_F], v_TW[first_F] = k_FW, v_FW
        return k_TW, v_TW
