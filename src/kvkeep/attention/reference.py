"""Attention written out in fp32: the oracle of every faster path, and the path of softcap and sinks.

Legend: B items, H query heads, K key/value heads, G = H / K, Q queries, S positions, D head size.
"""

import torch
from torch import Tensor

from kvkeep.attention.base import AttentionTerms

__all__ = ["reference_attention"]


def reference_attention(
    q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask_BQS: Tensor | None, terms: AttentionTerms
) -> Tensor:
    """softmax(softcap(q k^T * scaling) + mask, sinks) v, shape [B, H, Q, D of v], in q's dtype.

    `mask_BQS` is True where a query reads; None lets every query read all.
    """
    num_items, num_heads, num_queries, _ = q_BHQD.shape
    num_kv_heads = k_BKSD.shape[1]
    q = q_BHQD.float().reshape(num_items, num_kv_heads, -1, num_queries, q_BHQD.shape[-1])
    scores = q @ k_BKSD.float().unsqueeze(2).transpose(-1, -2) * terms.scaling
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    if mask_BQS is not None:
        scores = scores.masked_fill(~mask_BQS[:, None, None], float("-inf"))
    if terms.sinks_H is not None:
        sinks = terms.sinks_H.float().view(1, num_kv_heads, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(num_items, -1, -1, num_queries, 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : k_BKSD.shape[2]]
    out = weights @ v_BKSD.float().unsqueeze(2)
    return out.reshape(num_items, num_heads, num_queries, -1).to(q_BHQD.dtype)
