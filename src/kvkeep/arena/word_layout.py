"""The layout "words/1", which native kernels read: exact bytes in docs/formats.md.

A tile is the keys, or the values, of one block, layer and head: codes as a matrix of 32-bit words, then,
in quantised formats, a word of metadata for each token. A word of keys holds neighbouring dims of one
token, and a word of values neighbouring tokens of one dim, so that kernels go over tokens in the first
case and over dims in the second without shuffling anything.

    block       [layer][keys: head | values: head]
    keys        [dim / e][token] words of e elements, then [token] words of metadata
    values      [token / e][dim] words, then the same
    canonical   [layer][k|v], each [head][token][dim] codes, then [head][token] words of metadata

Legend: N blocks, B bytes of a block, K heads, S tokens of a block, D elements of a vector, C cells of a word,
the smallest parts of it that can be addressed (bytes of two elements in int4, else elements); "X" stands for
the two sizes of the matrix.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvkeep.spec import GroupSpec, KVFormat, LayerFormat

__all__ = ["Part", "WordLayout", "bits_of", "pack_nibbles", "unpack_nibbles", "with_own_formats"]

_WORD_BITS = 32
# Codes are moved as integers: floats keep every bit on the way, those of NaN included.
_BITS_TO_CELL = {32: torch.int32, 16: torch.int16, 8: torch.uint8, 4: torch.uint8}


@dataclass(frozen=True, slots=True)
class Part:
    """The keys, or the values, of one layer in a block, from byte `start` on: a tile a head."""

    format: KVFormat
    is_keys: bool
    num_heads: int
    dim: int
    block_size: int
    start: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a tile before its metadata."""
        return self.block_size * self.dim * self.format.bits // 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return self.block_size * self.format.vector_bytes(self.dim)

    @property
    def stop(self) -> int:
        """The byte behind the last tile."""
        return self.start + self.num_heads * self.tile_bytes

    @property
    def elements_of_word(self) -> int:
        """Elements of one word."""
        return _WORD_BITS // self.format.bits

    def cells(self, blocks_NB: Tensor) -> Tensor:
        """The codes as a view: keys [N, K, D/e, S, C], values [N, K, S/e, D, C]."""
        codes_NKB = self._tiles(blocks_NB)[:, :, : self.code_bytes]
        cells_NKX = codes_NKB.view(_BITS_TO_CELL[self.format.bits])
        num_cells = min(self.elements_of_word, _WORD_BITS // 8)
        across, along = (self.dim, self.block_size) if self.is_keys else (self.block_size, self.dim)
        shape = (across // self.elements_of_word, along, num_cells)
        cells: Tensor = cells_NKX.unflatten(2, shape)
        return cells

    def metadata(self, blocks_NB: Tensor) -> Tensor:
        """The words of metadata as a view, [N, K, S] int32."""
        return self._tiles(blocks_NB)[:, :, self.code_bytes :].view(torch.int32)

    def codes(self, blocks_NB: Tensor) -> Tensor:
        """All codes of all blocks in canonical order, [N, K, S, D], one a cell."""
        words = self.cells(blocks_NB)
        if self.format is KVFormat.INT4:
            words = unpack_nibbles(words)
        if self.is_keys:
            return words.permute(0, 1, 3, 2, 4).flatten(3)
        return words.permute(0, 1, 2, 4, 3).flatten(2, 3)

    def put_codes(self, blocks_NB: Tensor, codes_NKSD: Tensor) -> None:
        """The inverse of `codes`: write them to where they lie."""
        size = self.elements_of_word
        if self.is_keys:
            words = codes_NKSD.unflatten(3, (-1, size)).permute(0, 1, 3, 2, 4)
        else:
            words = codes_NKSD.unflatten(2, (-1, size)).permute(0, 1, 2, 4, 3)
        self.cells(blocks_NB).copy_(pack_nibbles(words) if self.format is KVFormat.INT4 else words)

    def _tiles(self, blocks_NB: Tensor) -> Tensor:
        shape = (self.num_heads, self.tile_bytes)
        tiles_NKB: Tensor = blocks_NB[:, self.start : self.stop].unflatten(1, shape)
        return tiles_NKB


@dataclass(frozen=True, slots=True)
class WordLayout:
    """Byte offsets inside a group's blocks of `block_size` tokens; the spec has a format for each layer."""

    spec: GroupSpec
    block_size: int

    name = "words/1"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.spec.block_bytes(self.block_size)

    def layer_offset(self, layer: int) -> int:
        """Bytes before the group's `layer`-th layer, in a block."""
        before = replace(
            self.spec, layers=self.spec.layers[:layer], formats=self.spec.formats[:layer]
        )
        return before.block_bytes(self.block_size)

    def keys(self, layer: int) -> Part:
        """Where the keys of the group's `layer`-th layer lie."""
        spec, size = self.spec, self.block_size
        start = self.layer_offset(layer)
        return Part(spec.formats[layer].k, True, spec.k_heads, spec.k_dim, size, start)  # noqa: FBT003

    def values(self, layer: int) -> Part:
        """Where the values of the group's `layer`-th layer lie."""
        spec, size = self.spec, self.block_size
        start = self.keys(layer).stop
        return Part(spec.formats[layer].v, False, spec.v_heads, spec.v_dim, size, start)  # noqa: FBT003

    def to_canonical(self, block_B: Tensor) -> Tensor:
        """A block's bytes in canonical order; `block_B` has shape [block_bytes]."""
        pieces = []
        for part in self._parts():
            codes_KSD = part.codes(block_B[None])[0]
            if part.format is KVFormat.INT4:
                codes_KSD = codes_KSD[..., ::2] | codes_KSD[..., 1::2] << 4
            pieces += [codes_KSD, part.metadata(block_B[None])[0]]
        return torch.cat([piece.contiguous().view(torch.uint8).flatten() for piece in pieces])

    def from_canonical(self, block_B: Tensor) -> Tensor:
        """A block's bytes in this layout's order; the inverse of `to_canonical`."""
        result_1B = torch.empty_like(block_B)[None]
        for part in self._parts():
            shape = (part.num_heads, self.block_size, -1)
            middle = part.start + part.num_heads * part.code_bytes
            codes_KSD = block_B[part.start : middle].view(_BITS_TO_CELL[part.format.bits])
            codes_KSD = codes_KSD.view(shape)
            if part.format is KVFormat.INT4:
                codes_KSD = torch.stack((codes_KSD & 15, codes_KSD >> 4), dim=-1).flatten(2)
            part.put_codes(result_1B, codes_KSD[None])
            if part.format.is_quantised:
                metadata_KS = block_B[middle : part.stop].view(torch.int32).view(shape[:2])
                part.metadata(result_1B)[0] = metadata_KS
        return result_1B[0]

    def _parts(self) -> list[Part]:
        return [
            part(layer)
            for layer in range(len(self.spec.layers))
            for part in (self.keys, self.values)
        ]


def with_own_formats(spec: GroupSpec, dtype: torch.dtype) -> GroupSpec:
    """`spec` with the format of the model's own dtype for every layer, where it has no formats."""
    if spec.formats:
        return spec
    own = KVFormat(str(dtype).removeprefix("torch."))
    return replace(spec, formats=(LayerFormat(own, own),) * len(spec.layers))


def bits_of(codes: Tensor) -> Tensor:
    """Codes of any format as the integers that cells hold: the same bits."""
    return codes.view(_BITS_TO_CELL[codes.element_size() * 8])


def pack_nibbles(words_X8: Tensor) -> Tensor:
    """Eight 4-bit elements of each word as four bytes: element i below element 4 + i."""
    return words_X8[..., :4] | words_X8[..., 4:] << 4


def unpack_nibbles(words_X4: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.cat((words_X4 & 15, words_X4 >> 4), dim=-1)
