"""Rows into words and back by the compiled kernels: the fast WordRows on the CPU.

Legend: N blocks, B bytes of a block, T tokens, K heads, D elements of a vector, W = K * D.
"""

import torch
from torch import Tensor

from kvkeep.arena.slots import Slots
from kvkeep.arena.split_arena import SplitArena
from kvkeep.arena.word_layout import WordLayout
from kvkeep.arena.words import WordArena
from kvkeep.codecs.rotation import signs
from kvkeep.native import ArenaRef, Format, Kernels
from kvkeep.spec import KVFormat

__all__ = ["NativeWordRows", "native_arena"]

_FORMATS = {
    KVFormat.FLOAT32: Format.F32,
    KVFormat.FLOAT16: Format.F16,
    KVFormat.BFLOAT16: Format.BF16,
    KVFormat.FP8: Format.FP8,
    KVFormat.INT8: Format.INT8,
    KVFormat.INT4: Format.INT4,
}


def native_arena(kernels: Kernels, arena: WordArena | SplitArena) -> ArenaRef:
    """The blocks of an arena as the kernels take them; valid as long as its storage is."""
    if isinstance(arena, SplitArena):
        rest, first = native_arena(kernels, arena.rest), native_arena(kernels, arena.first)
        return kernels.with_first_blocks(rest, first)
    return _arena_ref(kernels, arena.storage, arena.layout)


def _arena_ref(kernels: Kernels, storage_NB: Tensor, layout: WordLayout) -> ArenaRef:
    spec, layers = layout.spec, range(len(layout.spec.layers))
    return kernels.arena(
        storage_NB,
        block_size=layout.block_size,
        num_kv_heads=spec.k_heads,
        layer_offsets_bytes=[layout.layer_offset(layer) for layer in layers],
        k_formats=[_FORMATS[one.k] for one in spec.formats],
        v_formats=[_FORMATS[one.v] for one in spec.formats],
        k_signs_D=torch.tensor(signs(spec.k_dim), dtype=torch.float32),
        v_signs_D=torch.tensor(signs(spec.v_dim), dtype=torch.float32),
    )


class NativeWordRows:
    """Encodes and decodes through the kernels; arguments as of WordRows."""

    def __init__(
        self, kernels: Kernels, storage_NB: Tensor, layout: WordLayout, dtype: torch.dtype
    ) -> None:
        self._kernels = kernels
        self._arena = _arena_ref(kernels, storage_NB, layout)
        self._spec = layout.spec
        self._scratch = torch.empty(2, 0, dtype=dtype)

    def write(self, layer: int, slots: Slots, k_TW: Tensor, v_TW: Tensor) -> None:
        """Encode rows of T tokens into their slots."""
        spec = self._spec
        ref = self._kernels.slots(slots.blocks_T, slots.offsets_T)
        self._kernels.check_slots(self._arena, ref)
        k_TKD = k_TW.reshape(-1, spec.k_heads, spec.k_dim)
        v_TKD = v_TW.reshape(-1, spec.v_heads, spec.v_dim)
        self._kernels.write(self._arena, layer, ref, k_TKD, v_TKD)

    def read(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """Decode rows of T tokens."""
        k_TW, v_TW = self.borrow(layer, slots)
        return k_TW.clone(), v_TW.clone()

    def borrow(self, layer: int, slots: Slots) -> tuple[Tensor, Tensor]:
        """The same in memory that the next `borrow` overwrites."""
        spec, num_tokens = self._spec, len(slots.blocks_T)
        widest = num_tokens * max(spec.k_width, spec.v_width)
        if self._scratch.shape[1] < widest:
            self._scratch = self._scratch.new_empty(2, widest)
        k_TW = self._scratch[0, : num_tokens * spec.k_width].view(num_tokens, spec.k_width)
        v_TW = self._scratch[1, : num_tokens * spec.v_width].view(num_tokens, spec.v_width)
        ref = self._kernels.slots(slots.blocks_T, slots.offsets_T)
        self._kernels.check_slots(self._arena, ref)
        k_TKD = k_TW.view(-1, spec.k_heads, spec.k_dim)
        v_TKD = v_TW.view(-1, spec.v_heads, spec.v_dim)
        self._kernels.read(self._arena, layer, ref, k_TKD, v_TKD)
        return k_TW, v_TW
