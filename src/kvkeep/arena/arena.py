"""K/V as the model computes them, a row of all heads a token: see base.py for the contract.

Legend: N blocks, T tokens, W elements of a token's keys or values in one layer, E elements of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkeep.arena.layout import BlockLayout
from kvkeep.arena.slots import Slots
from kvkeep.spec import BlockId, GroupSpec

__all__ = ["Arena"]

# One addition for all layers while its result is small; beyond, one for each layer.
_MOST_ROWS_AT_ONCE = 2**18


class Arena:
    """Blocks in the layout "tokens-first/1", elements of the model's dtype."""

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
        self._rows = _Rows(self._storage, self.layout)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self._storage.numel() * self._storage.element_size()

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self._storage.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self._storage.dtype

    def is_exact(self, layer: int) -> bool:
        """Always: rows are kept as they come."""
        return True

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Put one layer's keys and values of T tokens into their slots; [T, heads, dim] will do as well."""
        self._rows.write(layer, slots, k_TW, v_TW)

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """One layer's keys [T, k_width] and values [T, v_width] of T tokens, in the order of `slots`."""
        return self._rows.read(layer, slots)

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read` in memory that the next `borrow` overwrites.

        Fresh memory for every read would cost as much in page faults as the copy itself.
        """
        return self._rows.borrow(layer, slots)

    def block(self, block: BlockId) -> Tensor:
        """All elements of a block, shape [E], as they lie: a view."""
        size = self.layout.block_elements
        return self._storage[block * size : (block + 1) * size]

    def fill(self, blocks: Sequence[BlockId], value: float) -> None:
        """Set every element of the blocks to `value`."""
        for block in blocks:
            self.block(block).fill_(value)


class _Rows:
    """The storage as rows of keys and of values.

    A row is a run of elements that starts at a multiple of the layout's unit; rows may overlap. Where keys
    and values are equally wide they do not, and one copy moves both.
    """

    def __init__(self, storage: Tensor, layout: BlockLayout) -> None:
        spec, unit = layout.spec, layout.unit
        self._rows_per_block = layout.block_elements // unit
        self._k_stride, self._v_stride = spec.k_width // unit, spec.v_width // unit
        self._is_even = spec.k_width == spec.v_width
        firsts = [
            [layout.k_offset(at) // unit, layout.v_offset(at) // unit]
            for at in range(len(spec.layers))
        ]
        self._firsts_L21 = torch.tensor(firsts, device=storage.device).unsqueeze(-1)
        self._k_rows = _rows_of(storage, spec.k_width, unit)
        self._v_rows = _rows_of(storage, spec.v_width, unit)
        self._scratch = storage.new_empty(0, spec.k_width)

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        if self._is_even:
            both = torch.stack((k_TW, v_TW)).view(-1, self._k_rows.shape[1])
            self._k_rows.index_copy_(0, self._even_row_numbers(layer, slots), both)
            return
        k_rows_T, v_rows_T = self._row_numbers(layer, slots)
        self._k_rows.index_copy_(0, k_rows_T, k_TW.flatten(1))
        self._v_rows.index_copy_(0, v_rows_T, v_TW.flatten(1))

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        if self._is_even:
            both = torch.index_select(self._k_rows, 0, self._even_row_numbers(layer, slots))
            k_TW, v_TW = both.view(2, -1, both.shape[1]).unbind()
            return k_TW, v_TW
        k_rows_T, v_rows_T = self._row_numbers(layer, slots)
        return (
            torch.index_select(self._k_rows, 0, k_rows_T),
            torch.index_select(self._v_rows, 0, v_rows_T),
        )

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        if not self._is_even:
            return self.read(layer, slots)
        rows_2T = self._even_row_numbers(layer, slots)
        if self._scratch.shape[0] < rows_2T.shape[0]:
            self._scratch = self._k_rows.new_empty(rows_2T.shape[0], self._k_rows.shape[1])
        both = self._scratch[: rows_2T.shape[0]]
        torch.index_select(self._k_rows, 0, rows_2T, out=both)
        k_TW, v_TW = both.view(2, -1, both.shape[1]).unbind()
        return k_TW, v_TW

    def _even_row_numbers(self, layer: int, slots: Slots) -> Tensor:
        """Of the keys of all tokens, then of their values."""
        base_T = slots.bases(self._rows_per_block, self._k_stride)
        if self._firsts_L21.shape[0] * base_T.numel() > _MOST_ROWS_AT_ONCE:
            return (self._firsts_L21[layer] + base_T).view(-1)
        if not slots.layer_rows:
            slots.layer_rows = (self._firsts_L21 + base_T).flatten(1).unbind()
        return slots.layer_rows[layer]

    def _row_numbers(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        k_first, v_first = self._firsts_L21[layer]
        return (
            k_first + slots.bases(self._rows_per_block, self._k_stride),
            v_first + slots.bases(self._rows_per_block, self._v_stride),
        )


def _rows_of(storage: Tensor, width: int, unit: int) -> Tensor:
    num_rows = (storage.numel() - width) // unit + 1
    return storage.as_strided((num_rows, width), (unit, 1))
