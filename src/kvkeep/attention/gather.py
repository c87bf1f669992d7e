"""Attention in plain torch: gather the positions an item reads, then scaled_dot_product_attention.

Legend: T packed tokens, H query heads, K key/value heads, G = H / K, D head size, B items, Q queries of an
item, S positions it reads, W = K * D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvkeep.arena import ArenaGroups
from kvkeep.attention.base import AttentionTerms
from kvkeep.attention.inputs import GroupInputs, Item, ReadBatch, build_group_inputs
from kvkeep.attention.reference import reference_attention
from kvkeep.spec import GroupSpec

__all__ = ["GatherAttention", "attend_gathered_batches"]

# Of a span behind others: each piece of it is one more call, and leaves out more of what is masked.
_QUERIES_AT_ONCE = 512


class GatherAttention:
    """The backend that runs everywhere torch runs; see AttentionBackend for the contract."""

    def __init__(self, arenas: ArenaGroups) -> None:
        self._arenas = arenas.arenas

    def inputs(self, group: int, items: Sequence[Item]) -> GroupInputs:
        """Where a step's items are written and what they read in a group."""
        arena = self._arenas[group]
        layout = arena.layout
        return build_group_inputs(layout.spec, layout.block_size, items, arena.device)

    def write(
        self, inputs: GroupInputs, group: int, layer: int, k_1KTD: Tensor, v_1KTD: Tensor
    ) -> None:
        """Put the keys and values of the step's T tokens where the inputs say."""
        k_TKD, v_TKD = k_1KTD[0].transpose(0, 1), v_1KTD[0].transpose(0, 1)
        if inputs.written_rows is not None:
            k_TKD, v_TKD = k_TKD[inputs.written_rows], v_TKD[inputs.written_rows]
        self._arenas[group].write(layer, inputs.write_slots, k_TKD, v_TKD)

    def read(self, inputs: GroupInputs, group: int, layer: int) -> tuple[Tensor, Tensor]:
        """All positions that the step's items read, batch after batch."""
        arena = self._arenas[group]
        parts = [
            _by_head(arena.layout.spec, batch, arena.read(layer, batch.slots))
            for batch in inputs.batches
        ]
        k_BKSD, v_BKSD = zip(*parts, strict=True)
        return _concatenate(k_BKSD), _concatenate(v_BKSD)

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
        outputs = self.attend_batches(inputs, group, layer, q_1HTD, new_kv, terms)
        return _scatter(inputs, q_1HTD.shape[2], outputs)

    def attend_batches(
        self,
        inputs: GroupInputs,
        group: int,
        layer: int,
        q_1HTD: Tensor,
        new_kv: tuple[Tensor, Tensor],
        terms: AttentionTerms,
    ) -> list[Tensor]:
        """The same for each batch of the inputs, [B*Q, H, D]."""
        arena, outputs = self._arenas[group], []
        borrowed: tuple[Tensor, Tensor] | None = None
        for batch in inputs.batches:
            if batch.is_whole and batch.num_items == 1 and arena.is_exact(layer):
                # The tokens just written are all there is to read: no need to fetch them back.
                k, v = new_kv[0][:, :, batch.rows], new_kv[1][:, :, batch.rows]
            else:
                if borrowed is None or not batch.is_beginning:
                    borrowed = arena.borrow(layer, batch.slots)
                k_SW, v_SW = (part[: batch.num_items * batch.num_positions] for part in borrowed)
                k, v = _by_head(arena.layout.spec, batch, (k_SW, v_SW))
            outputs.append(_attend_batch(batch, _rows(batch, q_1HTD), k, v, terms))
        return outputs

    def attend_gathered(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> Tensor:
        """Attention over what `read` returned, after the model has transformed it."""
        return _scatter(inputs, q_1HTD.shape[2], attend_gathered_batches(inputs, q_1HTD, kv, terms))


def attend_gathered_batches(
    inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
) -> list[Tensor]:
    """Attention of each batch over its part of what was read and transformed, [B*Q, H, D]."""
    outputs, at = [], 0
    for batch in inputs.batches:
        num_positions = batch.num_items * batch.num_positions
        k, v = (
            part[0, :, at : at + num_positions].unflatten(1, (batch.num_items, -1)).transpose(0, 1)
            for part in kv
        )
        outputs.append(_attend_batch(batch, _rows(batch, q_1HTD), k, v, terms))
        at += num_positions
    return outputs


def _by_head(spec: GroupSpec, batch: ReadBatch, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, S, D] of a batch, as views of what was read."""
    k_BSKD = kv[0].view(batch.num_items, -1, spec.k_heads, spec.k_dim)
    v_BSKD = kv[1].view(batch.num_items, -1, spec.v_heads, spec.v_dim)
    return k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)


def _concatenate(parts_BKSD: tuple[Tensor, ...]) -> Tensor:
    """[1, K, sum of B*S, D]."""
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts_BKSD], dim=1)[None]


def _attend_batch(
    batch: ReadBatch, q_THD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, terms: AttentionTerms
) -> Tensor:
    """Attention of one batch, shape [B*Q, H, D]."""
    num_heads, num_kv_heads = q_THD.shape[1], k_BKSD.shape[1]
    if terms.is_plain and batch.num_queries == 1:
        # The heads of a K/V head become its queries: no K/V is repeated, and one read serves them all.
        q_BKGD = q_THD.reshape(batch.num_items, num_kv_heads, -1, q_THD.shape[2])
        mask = None if batch.mask_BQS is None else batch.mask_BQS[:, None]
        out = scaled_dot_product_attention(
            q_BKGD, k_BKSD, v_BKSD, attn_mask=mask, scale=terms.scaling
        )
        return out.reshape(batch.num_items, num_heads, -1)
    q_BHQD = q_THD.view(batch.num_items, -1, num_heads, q_THD.shape[2]).transpose(1, 2)
    if terms.is_plain and batch.mask_BQS is not None:
        out = _attend_masked(q_BHQD, k_BKSD, v_BKSD, batch.mask_BQS, terms.scaling)
    elif terms.is_plain:
        out = scaled_dot_product_attention(
            q_BHQD,
            k_BKSD,
            v_BKSD,
            is_causal=batch.is_causal,
            scale=terms.scaling,
            enable_gqa=num_heads != num_kv_heads,
        )
    else:
        out = reference_attention(q_BHQD, k_BKSD, v_BKSD, _explicit_mask(batch, q_THD), terms)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_masked(
    q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BQS: Tensor, scaling: float
) -> Tensor:
    """Attention in pieces of the queries, [B, H, Q, D].

    A mask hides what lies behind a query, but does not save computing it; a piece leaves out what lies behind
    its last query, which the last position belongs to.
    """
    num_queries, num_before = mask_BQS.shape[1], mask_BQS.shape[2] - mask_BQS.shape[1]
    pieces = []
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
        stop = min(start + _QUERIES_AT_ONCE, num_queries)
        pieces.append(
            scaled_dot_product_attention(
                q_BHQD[:, :, start:stop],
                k_BKSD[:, :, : num_before + stop],
                v_BKSD[:, :, : num_before + stop],
                attn_mask=mask_BQS[:, None, start:stop, : num_before + stop],
                scale=scaling,
                enable_gqa=q_BHQD.shape[1] != k_BKSD.shape[1],
            )
        )
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _explicit_mask(batch: ReadBatch, q_THD: Tensor) -> Tensor | None:
    if not batch.is_causal:
        return batch.mask_BQS
    size = batch.num_queries
    return torch.ones(1, size, size, dtype=torch.bool, device=q_THD.device).tril()


def _rows(batch: ReadBatch, q_1HTD: Tensor) -> Tensor:
    """The queries of a batch, [B*Q, H, D]."""
    q_THD = q_1HTD[0].transpose(0, 1)
    return q_THD if batch.is_all else q_THD[batch.rows]


def _scatter(inputs: GroupInputs, num_tokens: int, outputs: list[Tensor]) -> Tensor:
    """The batches' outputs in packed order, [1, T, H, D]."""
    if len(outputs) == 1:
        return outputs[0].unsqueeze(0)
    out_THD = outputs[0].new_empty(num_tokens, *outputs[0].shape[1:])
    for batch, part in zip(inputs.batches, outputs, strict=True):
        out_THD[batch.rows] = part
    return out_THD.unsqueeze(0)
