"""Attention in plain torch: gather the positions an item reads, then scaled_dot_product_attention.

Legend: T packed tokens, H query heads, K key/value heads, G = H / K, D head size, B items, Q queries of an
item, S positions it reads, W = K * D.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvkeep.arena import ArenaGroups
from kvkeep.attention.base import AttentionTerms
from kvkeep.attention.inputs import GroupInputs, ReadBatch
from kvkeep.attention.reference import reference_attention

__all__ = ["GatherAttention"]


class GatherAttention:
    """The backend that runs everywhere torch runs; see AttentionBackend for the contract."""

    def __init__(self, arenas: ArenaGroups) -> None:
        self._arenas = arenas.arenas

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
        parts = [self._read_batch(group, layer, batch) for batch in inputs.batches]
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
        outputs = []
        for batch in inputs.batches:
            if batch.is_whole and batch.num_items == 1:
                # The tokens just written are all there is to read: no need to fetch them back.
                k, v = new_kv[0][:, :, batch.rows], new_kv[1][:, :, batch.rows]
            else:
                k, v = self._read_batch(group, layer, batch)
            outputs.append(_attend_batch(batch, q_1HTD, k, v, terms))
        return _scatter(inputs, q_1HTD.shape[2], outputs)

    def attend_gathered(
        self, inputs: GroupInputs, q_1HTD: Tensor, kv: tuple[Tensor, Tensor], terms: AttentionTerms
    ) -> Tensor:
        """Attention over what `read` returned, after the model has transformed it."""
        outputs, at = [], 0
        for batch in inputs.batches:
            num_positions = batch.num_items * batch.num_positions
            k, v = (
                part[0, :, at : at + num_positions]
                .unflatten(1, (batch.num_items, -1))
                .transpose(0, 1)
                for part in kv
            )
            outputs.append(_attend_batch(batch, q_1HTD, k, v, terms))
            at += num_positions
        return _scatter(inputs, q_1HTD.shape[2], outputs)

    def _read_batch(self, group: int, layer: int, batch: ReadBatch) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, S, D] of a batch, as views of one row copy per position."""
        arena = self._arenas[group]
        spec = arena.layout.spec
        k_TW, v_TW = arena.read(layer, batch.slots)
        k_BSKD = k_TW.view(batch.num_items, -1, spec.k_heads, spec.k_dim)
        v_BSKD = v_TW.view(batch.num_items, -1, spec.v_heads, spec.v_dim)
        return k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)


def _concatenate(parts_BKSD: tuple[Tensor, ...]) -> Tensor:
    """[1, K, sum of B*S, D]."""
    return torch.cat([part.transpose(0, 1).flatten(1, 2) for part in parts_BKSD], dim=1)[None]


def _attend_batch(
    batch: ReadBatch, q_1HTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, terms: AttentionTerms
) -> Tensor:
    """Attention of one batch, shape [B*Q, H, D]."""
    q_BHQD = q_1HTD[0, :, batch.rows].unflatten(1, (batch.num_items, -1)).transpose(0, 1)
    num_heads, num_kv_heads = q_BHQD.shape[1], k_BKSD.shape[1]
    if not terms.is_plain:
        mask = batch.mask_BQS
        if batch.is_causal:
            mask = torch.ones(
                1, batch.num_queries, batch.num_queries, dtype=torch.bool, device=q_1HTD.device
            ).tril()
        out = reference_attention(q_BHQD, k_BKSD, v_BKSD, mask, terms)
        return out.transpose(1, 2).flatten(0, 1)
    if batch.num_queries == 1:
        # The heads of a K/V head become its queries: no K/V is repeated, and one read serves them all.
        q_BHQD = q_BHQD.reshape(batch.num_items, num_kv_heads, -1, q_BHQD.shape[-1])
    out = scaled_dot_product_attention(
        q_BHQD,
        k_BKSD,
        v_BKSD,
        attn_mask=None if batch.mask_BQS is None else batch.mask_BQS[:, None],
        is_causal=batch.is_causal and batch.num_queries > 1,
        scale=terms.scaling,
        enable_gqa=q_BHQD.shape[1] != num_kv_heads,
    )
    if batch.num_queries == 1:
        return out.reshape(batch.num_items, num_heads, -1)
    return out.transpose(1, 2).flatten(0, 1)


def _scatter(inputs: GroupInputs, num_tokens: int, outputs: list[Tensor]) -> Tensor:
    """The batches' outputs in packed order, [1, T, H, D]."""
    if len(outputs) == 1:
        return outputs[0].unsqueeze(0)
    out_THD = outputs[0].new_empty(num_tokens, *outputs[0].shape[1:])
    for batch, part in zip(inputs.batches, outputs, strict=True):
        out_THD[batch.rows] = part
    return out_THD.unsqueeze(0)
