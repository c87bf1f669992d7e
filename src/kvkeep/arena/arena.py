"""The device memory of one KV group, by BlockId.

Legend: N blocks, T tokens, W elements of a token's keys or values in one layer, E elements of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkeep.arena.layout import BlockLayout
from kvkeep.spec import BlockId, GroupSpec

__all__ = ["Arena"]


class Arena:
    """Blocks of K/V in one allocation; `layer` below counts within the group."""

    def __init__(
        self,
        spec: GroupSpec,
        block_size: int,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = BlockLayout(spec, block_size)
        self.num_blocks = num_blocks
        num_elements = num_blocks * self.layout.block_elements
        self._storage = torch.empty(num_elements, dtype=dtype, device=device)
        self._k_NTW = [self._view(self.layout.k_offset(at), spec.k_width) for at in self._layers()]
        self._v_NTW = [self._view(self.layout.v_offset(at), spec.v_width) for at in self._layers()]
        self._k_rows = self._rows(spec.k_width)
        self._v_rows = self._rows(spec.v_width)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._storage.numel() * self._storage.element_size()

    def write(self, layer: int, slots: "Slots", k_TW: Tensor, v_TW: Tensor) -> None:
        """Put one layer's keys and values of T tokens into their slots."""
        self._k_NTW[layer].index_put_((slots.blocks_T, slots.offsets_T), k_TW)
        self._v_NTW[layer].index_put_((slots.blocks_T, slots.offsets_T), v_TW)

    def read(self, layer: int, slots: "Slots") -> tuple[Tensor, Tensor]:
        """One layer's keys [T, k_width] and values [T, v_width] of T tokens, in the order of `slots`."""
        layout, unit = self.layout, self.layout.unit
        k_rows_T = slots.rows(layout, layout.k_offset(layer) // unit, layout.spec.k_width // unit)
        v_rows_T = slots.rows(layout, layout.v_offset(layer) // unit, layout.spec.v_width // unit)
        return (
            torch.index_select(self._k_rows, 0, k_rows_T),
            torch.index_select(self._v_rows, 0, v_rows_T),
        )

    def block(self, block: BlockId) -> Tensor:
        """All elements of a block, shape [E], as they lie: a view."""
        size = self.layout.block_elements
        return self._storage[block * size : (block + 1) * size]

    def fill(self, blocks: Sequence[BlockId], value: float) -> None:
        """Set every element of the blocks to `value`."""
        for block in blocks:
            self.block(block).fill_(value)

    def _layers(self) -> range:
        return range(len(self.layout.spec.layers))

    def _view(self, offset: int, width: int) -> Tensor:
        size = self.layout.block_elements
        shape = (self.num_blocks, self.layout.block_size, width)
        return self._storage.as_strided(shape, (size, width, 1), offset)

    def _rows(self, width: int) -> Tensor:
        """Every run of `width` elements that starts at a multiple of the unit; rows may overlap."""
        unit = self.layout.unit
        num_rows = (self._storage.numel() - width) // unit + 1
        return self._storage.as_strided((num_rows, width), (unit, 1))


class Slots:
    """The places of T tokens in one group, for every layer of it."""

    __slots__ = ("_bases", "blocks_T", "offsets_T")

    def __init__(self, blocks_T: Tensor, offsets_T: Tensor) -> None:
        self.blocks_T = blocks_T
        self.offsets_T = offsets_T
        self._bases: dict[int, Tensor] = {}

    def rows(self, layout: BlockLayout, first: int, rows_per_token: int) -> Tensor:
        """Row numbers of the tokens, given the layer's `first` row in a block; one addition a layer."""
        base = self._bases.get(rows_per_token)
        if base is None:
            rows_per_block = layout.block_elements // layout.unit
            base = self.blocks_T * rows_per_block + self.offsets_T * rows_per_token
            self._bases[rows_per_token] = base
        return base + first
