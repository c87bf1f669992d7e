"""Tokens on which a model's distributions are compared at load time, when there is no text.

They are of two kinds. Sequences sampled from the model itself are as likely as text is, and their many first
tokens bring the massive activations that models put there. Random tokens that are repeated make a model look
up precise places, which is what inexact keys harm first. Biases of keys are in both. On the bundled model
the mean divergence over both is one to three times that over held-out text (benchmarks/format_quality.py): on
the careful side.

Legend: B sequences, T their tokens, V vocabulary.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvkeep.hf.geometry import text_config

__all__ = ["probe_tokens"]

_NUM_SAMPLED, _SAMPLED_LENGTH = 16, 16
# Where every sequence needs forwards of its own.
_NUM_SAMPLED_IN_TURN = 4
_NUM_REPEATED, _REPEATED_LENGTH = 2, 64


def probe_tokens(model: PreTrainedModel, *, is_packed: bool) -> list[tuple[int, ...]]:
    """A few hundred tokens in short sequences, fewer unless `is_packed`: one forward computes all of them.

    Every sequence begins with the model's BOS, if it has one. Sampling takes one forward for each of its 15
    steps.
    """
    num_sampled = _NUM_SAMPLED if is_packed else _NUM_SAMPLED_IN_TURN
    config = text_config(model)
    generator = torch.Generator().manual_seed(0)
    most = min(getattr(config, "max_position_embeddings", None) or 4096, 4096)
    start = getattr(config, "bos_token_id", None)
    first_BT = torch.randint(config.vocab_size, (num_sampled, 1), generator=generator)
    bos: tuple[int, ...] = ()
    if isinstance(start, int):
        bos = (start,)
        first_BT = torch.cat([torch.full_like(first_BT, start), first_BT], dim=1)
    length = min(_REPEATED_LENGTH, most - 1) // 2
    repeated = []
    for _ in range(_NUM_REPEATED):
        ids = torch.randint(config.vocab_size, (length,), generator=generator).tolist()
        repeated.append((*bos, *ids, *ids)[:most])
    return [*_sampled(model, first_BT, min(_SAMPLED_LENGTH, most), generator), *repeated]


@torch.inference_mode()
def _sampled(
    model: PreTrainedModel, ids_BT: Tensor, length: int, generator: torch.Generator
) -> list[tuple[int, ...]]:
    """Sequences continued up to `length` tokens by the model itself, as likely as it finds them."""
    cache, new_BT = DynamicCache(config=text_config(model)), ids_BT
    while ids_BT.shape[1] < length:
        logits_BV = model(
            input_ids=new_BT.to(model.device), past_key_values=cache, use_cache=True
        ).logits[:, -1]
        weights_BV = logits_BV.float().softmax(-1).nan_to_num(1.0).cpu()
        new_BT = torch.multinomial(weights_BV, 1, generator=generator)
        ids_BT = torch.cat([ids_BT, new_BT], dim=1)
    return [tuple(ids) for ids in ids_BT.tolist()]
