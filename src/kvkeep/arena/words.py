"""K/V in any format, as matrices of words: see base.py for the contract, word_layout.py for the order.

What moves rows into words and back is `WordRows`: plain torch here, which is the oracle of the native
kernels and runs where they are not installed.

Legend: N blocks, B bytes of a block, T tokens, K heads, D elements of a vector, W = K * D, R = T * K vectors,
C cells of a word.
"""

from collections.abc import Callable, Sequence
from math import isnan
from typing import Protocol

import torch
from torch import Tensor

from kvkeep.arena.slots import Slots
from kvkeep.arena.word_layout import (
    Part,
    WordLayout,
    bits_of,
    pack_nibbles,
    unpack_nibbles,
    with_own_formats,
)
from kvkeep.codecs import Encoded, codec_of
from kvkeep.native import advise_huge_pages
from kvkeep.spec import BlockId, GroupSpec, KVFormat, LayerFormat

__all__ = ["TorchWordRows", "WordArena", "WordRows", "WordRowsOf"]

_EMPTY_BYTE = 0xFF  # NaN in every float format, and in metadata


class WordRows(Protocol):
    """Encodes rows into the words of one arena and decodes them; arguments as of GroupArena."""

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Encode one layer's keys and values of T tokens into their slots."""
        ...

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Decode one layer's keys [T, k_width] and values [T, v_width] of T tokens."""
        ...

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read` in memory that the next `borrow` may overwrite."""
        ...


# From the bytes of all blocks [N, B], their layout and the dtype of rows.
WordRowsOf = Callable[[Tensor, WordLayout, torch.dtype], WordRows]


class WordArena:
    """Blocks in the layout "words/1", elements of a block are bytes; rows are of `dtype`.

    Layers without a format are stored in `dtype`, to the last bit.
    """

    def __init__(
        self,
        spec: GroupSpec,
        block_size: int,
        num_blocks: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows_of: WordRowsOf | None = None,
    ) -> None:
        self.layout = WordLayout(with_own_formats(spec, dtype), block_size)
        self.num_blocks = num_blocks
        self.dtype = dtype
        # The bytes of all blocks, [N, B].
        self.storage = torch.empty(
            num_blocks, self.layout.block_bytes, dtype=torch.uint8, device=device
        )
        advise_huge_pages(self.storage)
        self._rows = (rows_of or TorchWordRows)(self.storage, self.layout, dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.storage.numel()

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.storage.device

    def is_exact(self, layer: int) -> bool:
        """Whether the layer's formats are the dtype of rows."""
        own = str(self.dtype).removeprefix("torch.")
        return self.layout.spec.formats[layer] == LayerFormat(KVFormat(own), KVFormat(own))

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Encode one layer's keys and values of T tokens; [T, heads, dim] will do as well."""
        self._rows.write(layer, slots, k_TW, v_TW)

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """One layer's keys [T, k_width] and values [T, v_width] of T tokens, in the order of `slots`."""
        return self._rows.read(layer, slots)

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read` in memory that the next `borrow` may overwrite."""
        return self._rows.borrow(layer, slots)

    def block(self, block: BlockId) -> Tensor:
        """All bytes of a block, shape [B], as they lie: a view."""
        return self.storage[block]

    def fill(self, blocks: Sequence[BlockId], value: float) -> None:
        """Make every key and value `value`, as far as the formats hold it; NaN is written to every byte."""
        if isnan(value):
            for block in blocks:
                self.block(block).fill_(_EMPTY_BYTE)
            return
        spec, size, device = self.layout.spec, self.layout.block_size, self.storage.device
        blocks_T = torch.tensor(blocks, dtype=torch.long, device=device).repeat_interleave(size)
        slots = Slots(blocks_T, torch.arange(size, device=device).repeat(len(blocks)))
        k_TW, v_TW = (
            torch.full((len(blocks_T), width), value, dtype=self.dtype, device=device)
            for width in (spec.k_width, spec.v_width)
        )
        for layer in range(len(spec.layers)):
            self.write(layer, slots, k_TW, v_TW)


class TorchWordRows:
    """Rows into words and back in plain torch: slow, on any device."""

    def __init__(self, storage_NB: Tensor, layout: WordLayout, dtype: torch.dtype) -> None:
        layers = range(len(layout.spec.layers))
        self._keys = [_Vectors(layout.keys(layer), storage_NB, dtype) for layer in layers]
        self._values = [_Vectors(layout.values(layer), storage_NB, dtype) for layer in layers]

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Encode rows of T tokens into their slots."""
        self._keys[layer].write(slots, k_TW)
        self._values[layer].write(slots, v_TW)

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Decode rows of T tokens."""
        return self._keys[layer].read(slots), self._values[layer].read(slots)

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same as `read`."""
        return self.read(layer, slots)


class _Vectors:
    """The vectors of one part of all blocks, at random slots."""

    def __init__(self, part: Part, storage_NB: Tensor, dtype: torch.dtype) -> None:
        self._part = part
        self._dtype = dtype
        self._codec = codec_of(part.format)
        self._cells = part.cells(storage_NB)
        self._metadata_NKS = part.metadata(storage_NB)

    def write(self, slots: Slots, x_TW: Tensor) -> None:
        part = self._part
        shape = (len(x_TW), part.num_heads, part.dim)
        encoded = self._codec.encode(x_TW.reshape(shape[0] * shape[1], shape[2]))
        codes_TKD = bits_of(encoded.codes_RD).view(shape)
        if part.is_keys:
            self._put_keys(slots, codes_TKD)
        else:
            self._put_values(slots, codes_TKD)
        if encoded.metadata_R is not None:
            metadata_TK = encoded.metadata_R.view(shape[:2])
            self._metadata_NKS[slots.blocks_T, :, slots.offsets_T] = metadata_TK

    def read(self, slots: Slots) -> Tensor:
        part = self._part
        codes_TKD = self._keys(slots) if part.is_keys else self._values(slots)
        codes_RD = codes_TKD.reshape(-1, part.dim)
        if not part.format.is_quantised:
            encoded = Encoded(codes_RD.view(getattr(torch, part.format)))
        else:
            metadata_TK = self._metadata_NKS[slots.blocks_T, :, slots.offsets_T]
            encoded = Encoded(codes_RD, metadata_TK.flatten())
        rows_RD = self._codec.decode(encoded, self._dtype)
        return rows_RD.view(len(slots.blocks_T), part.num_heads * part.dim)

    def _put_keys(self, slots: Slots, codes_TKD: Tensor) -> None:
        words = codes_TKD.unflatten(2, (-1, self._part.elements_of_word))
        if self._part.format is KVFormat.INT4:
            words = pack_nibbles(words)
        self._cells[slots.blocks_T, :, :, slots.offsets_T] = words

    def _keys(self, slots: Slots) -> Tensor:
        words = self._cells[slots.blocks_T, :, :, slots.offsets_T]
        if self._part.format is KVFormat.INT4:
            words = unpack_nibbles(words)
        return words.flatten(2)

    def _put_values(self, slots: Slots, codes_TKD: Tensor) -> None:
        if self._part.format is not KVFormat.INT4:
            blocks_T, words_T, cells_T = self._value_places(slots)
            self._cells[blocks_T, :, words_T, :, cells_T] = codes_TKD
            return
        # Two tokens may share a byte, but not both in the same half of it.
        is_high_T = slots.offsets_T % 8 >= 4
        for shift, is_chosen_T in ((0, ~is_high_T), (4, is_high_T)):
            chosen = Slots(slots.blocks_T[is_chosen_T], slots.offsets_T[is_chosen_T])
            blocks_T, words_T, cells_T = self._value_places(chosen)
            others_TKD = self._cells[blocks_T, :, words_T, :, cells_T] & 15 << 4 - shift
            self._cells[blocks_T, :, words_T, :, cells_T] = (
                others_TKD | codes_TKD[is_chosen_T] << shift
            )

    def _values(self, slots: Slots) -> Tensor:
        blocks_T, words_T, cells_T = self._value_places(slots)
        codes_TKD = self._cells[blocks_T, :, words_T, :, cells_T]
        if self._part.format is not KVFormat.INT4:
            return codes_TKD
        shift_T11 = (slots.offsets_T % 8 // 4 * 4)[:, None, None].to(torch.uint8)
        return codes_TKD >> shift_T11 & 15

    def _value_places(self, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """Block, word and cell of each token's values."""
        word_T = slots.offsets_T // self._part.elements_of_word
        cell_T = slots.offsets_T % self._part.elements_of_word % self._cells.shape[-1]
        return slots.blocks_T, word_T, cell_T
