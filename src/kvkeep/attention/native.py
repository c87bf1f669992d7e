"""Attention by the compiled CPU kernels: short segments read blocks where they lie.

Segments of more than MOST_QUERIES tokens are gathered and left to torch, whose attention over many queries
is bound by arithmetic, not by reading. Legend: T packed tokens, I items, B entries of all tables, H query
heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvkeep.arena import ArenaGroups, SplitArena, WordArena, WordLayout, native_arena
from kvkeep.attention.base import AttentionTerms
from kvkeep.attention.gather import GatherAttention, attend_gathered_batches
from kvkeep.attention.inputs import GroupInputs, Item, PagedInputs, build_group_inputs
from kvkeep.native import MOST_QUERIES, ArenaRef, ItemsRef, Kernels, ReadKind, TermsRef
from kvkeep.spec import GroupSpec, LayerKind

__all__ = ["NativeAttention"]

_CPU = torch.device("cpu")
_READ_KINDS = {
    LayerKind.FULL: ReadKind.FULL,
    LayerKind.SLIDING: ReadKind.SLIDING,
    LayerKind.CHUNKED: ReadKind.CHUNKED,
}


class NativeAttention:
    """The backend of the CPU kernels over word arenas; see AttentionBackend for the contract."""

    def __init__(self, arenas: ArenaGroups, kernels: Kernels) -> None:
        self._kernels = kernels
        self._gather = GatherAttention(arenas)
        self._layouts: dict[int, WordLayout] = {}
        self._refs: dict[int, ArenaRef] = {}
        for group, arena in arenas.arenas.items():
            assert isinstance(arena, WordArena | SplitArena)
            self._layouts[group] = arena.layout
            self._refs[group] = native_arena(kernels, arena)
        self._layer_to_terms: dict[tuple[int, int], tuple[AttentionTerms, TermsRef]] = {}

    def inputs(self, group: int, items: Sequence[Item]) -> GroupInputs:
        """Where a step's items are written and what they read in a group.

        Raises KernelError when a block lies outside of the arena.
        """
        self._kernels.num_threads = torch.get_num_threads()
        layout, ref = self._layouts[group], self._refs[group]
        short = [item for item in items if len(item.span) <= MOST_QUERIES]
        long = [item for item in items if len(item.span) > MOST_QUERIES]
        gathered = build_group_inputs(layout.spec, layout.block_size, items, _CPU, gathered=long)
        slots = self._kernels.slots(gathered.write_slots.blocks_T, gathered.write_slots.offsets_T)
        self._kernels.check_slots(ref, slots)
        read = None
        if short:
            num_rows = sum(len(item.span) for item in items)
            read = _items_ref(self._kernels, layout.spec, layout.block_size, short, num_rows)
            self._kernels.check_items(ref, read)
        return replace(gathered, paged=PagedInputs(slots, read))

    def write(
        self, inputs: GroupInputs, group: int, layer: int, k_1KTD: Tensor, v_1KTD: Tensor
    ) -> None:
        """Put the keys and values of the step's T tokens where the inputs say."""
        k_TKD, v_TKD = k_1KTD[0].transpose(0, 1), v_1KTD[0].transpose(0, 1)
        written = inputs.written_rows
        if written is not None:
            k_TKD, v_TKD = k_TKD[written], v_TKD[written]
        assert inputs.paged is not None
        ref, slots = self._refs[group], inputs.paged.slots
        self._kernels.write(ref, layer, slots, _dense_dim(k_TKD), _dense_dim(v_TKD))

    def read(self, inputs: GroupInputs, group: int, layer: int) -> tuple[Tensor, Tensor]:
        """All positions that the long items read; a model that wants all K/V has no native mode."""
        return self._gather.read(inputs, group, layer)

    def attend(
        self,
        inputs: GroupInputs,
        group: int,
        layer: int,
        q_1HTD: Tensor,
        new_kv: tuple[Tensor, Tensor],
        terms: AttentionTerms,
    ) -> Tensor:
        """Attention of the step's T queries over the arena, shape [1, T, H, D]."""
        assert inputs.paged is not None
        items = inputs.paged.items
        if items is None:
            return self._gather.attend(inputs, group, layer, q_1HTD, new_kv, terms)
        q_THD = _dense_dim(q_1HTD[0].transpose(0, 1))
        ref = self._refs[group]
        out_THD = q_THD.new_empty(q_THD.shape[0], q_THD.shape[1], ref.v_dim)
        terms_ref = self._terms_ref(group, layer, terms)
        self._kernels.attend(ref, layer, items, terms_ref, q_THD, out_THD)
        long = self._gather.attend_batches(inputs, group, layer, q_1HTD, new_kv, terms)
        for batch, part in zip(inputs.batches, long, strict=True):
            out_THD[batch.rows] = part
        return out_THD.unsqueeze(0)

    def attend_latent(
        self, inputs: GroupInputs, group: int, layer: int, q_THD: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Attention of short items over MLA latents, rows [T, H, latent dims]; those of long ones stay unset.

        D is the latent's dims and then the rotated ones; at least one item is short.
        """
        assert inputs.paged is not None
        assert inputs.paged.items is not None
        ref = self._refs[group]
        out_THD = q_THD.new_empty(*q_THD.shape[:2], ref.k_dim)
        terms_ref = self._terms_ref(group, layer, terms)
        self._kernels.attend_latent(ref, layer, inputs.paged.items, terms_ref, q_THD, out_THD)
        return out_THD

    def attend_gathered(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> Tensor:
        """The same over what `read` returned, after the model has transformed it."""
        return self._gather.attend_gathered(inputs, q_1HTD, kv, terms)

    def attend_gathered_batches(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> list[Tensor]:
        """The same for each batch of long items, [B*Q, H, D]."""
        return attend_gathered_batches(inputs, q_1HTD, kv, terms)

    def _terms_ref(self, group: int, layer: int, terms: AttentionTerms) -> TermsRef:
        """A layer's terms as the kernels take them; made once, for they do not change."""
        known = self._layer_to_terms.get((group, layer))
        if known is not None and known[0].is_same(terms):
            return known[1]
        sinks_H = None if terms.sinks_H is None else terms.sinks_H.detach().float().contiguous()
        ref = self._kernels.terms(terms.scaling, softcap=terms.softcap, sinks_H=sinks_H)
        self._layer_to_terms[group, layer] = (terms, ref)
        return ref


def _items_ref(
    kernels: Kernels, spec: GroupSpec, block_size: int, items: Sequence[Item], num_rows: int
) -> ItemsRef:
    firsts = [spec.first_needed(item.span.start) // block_size for item in items]
    tables = [
        item.blocks[first : (item.span.stop - 1) // block_size + 1]
        for item, first in zip(items, firsts, strict=True)
    ]
    offsets = [0]
    for table in tables:
        offsets.append(offsets[-1] + len(table))
    return kernels.items(
        kind=_READ_KINDS[spec.kind],
        window=spec.window or 0,
        num_rows=num_rows,
        rows_I=_int32([item.row for item in items]),
        num_queries_I=_int32([len(item.span) for item in items]),
        starts_I=_int32([item.span.start for item in items]),
        table_firsts_I=_int32(firsts),
        table_offsets_I1=_int32(offsets),
        table_B=_int32([block for table in tables for block in table]),
    )


def _int32(values: Sequence[int | None]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _dense_dim(rows_THD: Tensor) -> Tensor:
    """The same with the last dim contiguous, as the kernels want it; it nearly always is."""
    return rows_THD if rows_THD.stride(-1) == 1 else rows_THD.contiguous()
