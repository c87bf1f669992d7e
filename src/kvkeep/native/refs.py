"""Tensors as the kernels take them: each ref holds a struct of addresses and the tensors behind them.

A ref is made once and passed to many calls. Legend: N blocks of the arena, T tokens, I items, B entries of
the tables of all items, L layers, D head size, H query heads.
"""

from collections.abc import Sequence
from ctypes import addressof, c_int32, c_int64
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvkeep.errors import KernelError
from kvkeep.native.structs import (
    ArenaStruct,
    Format,
    ItemsStruct,
    ReadKind,
    SlotsStruct,
    TermsStruct,
)

__all__ = ["MOST_DIM", "ArenaRef", "ItemsRef", "SlotsRef", "TermsRef"]
__all__ += ["arena_ref", "items_ref", "slots_ref", "terms_ref", "with_first_blocks"]

# The largest head size of keys or values.
MOST_DIM = 2048

_FORMAT_TO_BITS = {
    Format.F32: 32,
    Format.F16: 16,
    Format.BF16: 16,
    Format.FP8: 8,
    Format.INT8: 8,
    Format.INT4: 4,
}
_QUANTISED = frozenset({Format.FP8, Format.INT8, Format.INT4})


@dataclass(frozen=True, slots=True, eq=False)
class ArenaRef:
    """The arena of one KV group; valid as long as its tensor keeps its memory."""

    struct: ArenaStruct
    address: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    kept: tuple[object, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SlotsRef:
    """Places of T tokens, distinct where they are written."""

    struct: SlotsStruct
    address: int
    num_slots: int
    kept: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class ItemsRef:
    """Items that read an arena for queries in the first `num_rows` rows of a step."""

    struct: ItemsStruct
    address: int
    num_items: int
    num_rows: int
    kept: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TermsRef:
    """How a score is made of a product; `num_heads` is None where heads do not differ."""

    struct: TermsStruct
    address: int
    num_heads: int | None
    kept: tuple[Tensor | None, Tensor | None]


def arena_ref(
    blocks_NE: Tensor,
    *,
    block_size: int,
    num_kv_heads: int,
    layer_offsets_bytes: Sequence[int],
    k_formats: Sequence[Format],
    v_formats: Sequence[Format],
    k_signs_D: Tensor,
    v_signs_D: Tensor,
) -> ArenaRef:
    """An arena whose block i is row i of the contiguous tensor `blocks_NE`, of any dtype.

    The other lists have one entry for each layer. `k_signs_D` and `v_signs_D` (float32, 1 and -1) give the
    head sizes, at most MOST_DIM. Raises KernelError where a layer would not lie inside its block.
    """
    num_layers = len(layer_offsets_bytes)
    k_dim, v_dim = k_signs_D.numel(), v_signs_D.numel()
    if max(k_dim, v_dim) > MOST_DIM:
        raise KernelError(f"k_dim={k_dim}, v_dim={v_dim}: kernels take at most {MOST_DIM}")
    for name, signs_D in (("k_signs_D", k_signs_D), ("v_signs_D", v_signs_D)):
        _check(name, signs_D, torch.float32)
    if not (blocks_NE.is_cpu and blocks_NE.is_contiguous() and blocks_NE.data_ptr() % 4 == 0):
        raise KernelError(
            f"blocks_NE on {blocks_NE.device} is no contiguous tensor of words on the CPU"
        )
    if not num_layers == len(k_formats) == len(v_formats):
        counts = f"{num_layers} offsets, {len(k_formats)} and {len(v_formats)} formats"
        raise KernelError(f"layers are counted differently: {counts}")
    num_blocks = blocks_NE.shape[0]
    block_bytes = blocks_NE[0].numel() * blocks_NE.element_size() if num_blocks else 0
    tiles = [
        _tile_bytes(k_format, block_size, k_dim) + _tile_bytes(v_format, block_size, v_dim)
        for k_format, v_format in zip(k_formats, v_formats, strict=True)
    ]
    _check_offsets(layer_offsets_bytes, tiles, num_kv_heads, block_bytes)
    layers = (
        (c_int64 * num_layers)(*layer_offsets_bytes),
        (c_int32 * num_layers)(*k_formats),
        (c_int32 * num_layers)(*v_formats),
    )
    struct = ArenaStruct(
        blocks_NE.data_ptr(), num_blocks, block_bytes, block_size, num_layers, num_kv_heads, k_dim, v_dim,
        *(addressof(array) for array in layers), k_signs_D.data_ptr(), v_signs_D.data_ptr(),
    )  # fmt: skip
    kept = (blocks_NE, layers, k_signs_D, v_signs_D)
    return ArenaRef(struct, addressof(struct), num_kv_heads, k_dim, v_dim, kept)


def with_first_blocks(arena: ArenaRef, first: ArenaRef) -> ArenaRef:
    """`arena` with the first block of every table in `first`, whose block i has the id `num_blocks + i`.

    Both are of the same sizes, which kernels check, and may differ in formats.
    """
    struct = ArenaStruct.from_buffer_copy(arena.struct)
    struct.first_blocks = first.address
    return replace(
        arena, struct=struct, address=addressof(struct), kept=(*arena.kept, arena, first)
    )


def slots_ref(blocks_T: Tensor, offsets_T: Tensor) -> SlotsRef:
    """Slot i is offset `offsets_T[i]` of block `blocks_T[i]`; both int64."""
    num_slots = blocks_T.numel()
    _check("blocks_T", blocks_T, torch.int64, num_slots)
    _check("offsets_T", offsets_T, torch.int64, num_slots)
    struct = SlotsStruct(num_slots, blocks_T.data_ptr(), offsets_T.data_ptr())
    return SlotsRef(struct, addressof(struct), num_slots, (blocks_T, offsets_T))


def items_ref(  # noqa: PLR0913  the fields of the struct
    *,
    kind: ReadKind,
    window: int,
    num_rows: int,
    rows_I: Tensor,
    num_queries_I: Tensor,
    starts_I: Tensor,
    table_firsts_I: Tensor,
    table_offsets_I1: Tensor,
    table_B: Tensor,
) -> ItemsRef:
    """Items of 1 to 16 queries each, all tensors int32; the header says what they mean.

    `num_rows` is the number of packed rows that q and out will have. `table_offsets_I1` has one entry more
    than there are items, the first 0 and the last the length of `table_B`.
    """
    num_items = rows_I.numel()
    per_item = (rows_I, num_queries_I, starts_I, table_firsts_I)
    names = ("rows_I", "num_queries_I", "starts_I", "table_firsts_I")
    for name, tensor in zip(names, per_item, strict=True):
        _check(name, tensor, torch.int32, num_items)
    _check("table_offsets_I1", table_offsets_I1, torch.int32, num_items + 1)
    _check("table_B", table_B, torch.int32)
    offsets: list[int] = table_offsets_I1.tolist()
    if offsets[0] != 0 or offsets[-1] != table_B.numel() or offsets != sorted(offsets):
        raise KernelError(f"table_offsets_I1={offsets} does not go up from 0 to {table_B.numel()}")
    kept = (*per_item, table_offsets_I1, table_B)
    struct = ItemsStruct(num_items, kind, window, *(tensor.data_ptr() for tensor in kept))
    return ItemsRef(struct, addressof(struct), num_items, num_rows, kept)


def terms_ref(
    scaling: float,
    *,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None,
) -> TermsRef:
    """What makes softcap(scaling * q.k) + alibi_slope * position; tensors are float32, one a query head."""
    num_heads = None
    addresses = []
    for name, values_H in (("sinks_H", sinks_H), ("alibi_slopes_H", alibi_slopes_H)):
        if values_H is not None:
            _check(name, values_H, torch.float32, num_heads)
            num_heads = values_H.numel()
        addresses.append(None if values_H is None else values_H.data_ptr())
    struct = TermsStruct(scaling, softcap or 0.0, *addresses)
    return TermsRef(struct, addressof(struct), num_heads, (sinks_H, alibi_slopes_H))


def _check_offsets(
    offsets: Sequence[int], tiles: Sequence[int], num_kv_heads: int, block_bytes: int
) -> None:
    """Refuse a layer that lies not wholly in its block; its heads have so many bytes each."""
    for offset, head_bytes in zip(offsets, tiles, strict=True):
        if offset < 0 or offset % 4 or offset + num_kv_heads * head_bytes > block_bytes > 0:
            size = f"{num_kv_heads} heads of {head_bytes} bytes"
            rule = f"must begin at a multiple of 4 and end within {block_bytes} bytes"
            raise KernelError(f"layer offset {offset}: {size} {rule}")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, length: int | None = None) -> None:
    """Refuse what is no contiguous vector on the CPU of that dtype and length."""
    wanted = "any length" if length is None else f"length {length}"
    if tensor.dim() != 1 or (length is not None and tensor.numel() != length):
        raise KernelError(f"{name} has shape {tuple(tensor.shape)}, not one dim of {wanted}")
    if tensor.dtype != dtype or not tensor.is_cpu or not tensor.is_contiguous():
        found = f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        raise KernelError(f"{name} is {found}; give a contiguous {dtype} on the CPU")


def _tile_bytes(kv_format: Format, block_size: int, dim: int) -> int:
    """Bytes of the keys or values of one block, layer and kv head."""
    words = block_size * dim * _FORMAT_TO_BITS[kv_format] // 32
    return 4 * (words + (block_size if kv_format in _QUANTISED else 0))
