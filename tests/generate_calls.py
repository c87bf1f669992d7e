"""Calls of transformers' generate() and of a model itself, the same for every cache."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvkeep.arena import ArenaGroups
from kvkeep.cache import Receipt
from kvkeep.hf import generate_memory
from kvkeep.hf.generate_cache import KeepCache

PAD_LENGTHS = (29, 17, 9)


def poison_freed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let KeepCache fill freed blocks with NaN, so that reading what nobody wrote shows up."""
    monkeypatch.setattr(generate_memory, "ArenaGroups", partial(ArenaGroups, poison=True))


def prompt_of(num_tokens: int, seed: int = 0, num_rows: int = 1) -> Tensor:
    """Random tokens, [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 120, (num_rows, num_tokens), generator=generator)


def left_padded() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths and their mask, each [B, T]."""
    longest = max(PAD_LENGTHS)
    ids_BT = torch.zeros(len(PAD_LENGTHS), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, length in enumerate(PAD_LENGTHS):
        ids_BT[row, longest - length :] = prompt_of(length, seed=row)
        mask_BT[row, longest - length :] = 1
    return ids_BT, mask_BT


def generate(
    model: PreTrainedModel, ids_BT: Tensor | None = None, **options: Any
) -> list[list[int]]:
    """Tokens of `model.generate`: greedy, from a fixed random state, with a mask of ones, unless asked."""
    torch.manual_seed(7)
    mask_BT = None if ids_BT is None else torch.ones_like(ids_BT)
    defaults = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generator: Any = model  # the mixin that has `generate` is not in the class's type
    tokens_BT: Tensor = generator.generate(
        input_ids=ids_BT, **{"attention_mask": mask_BT, **defaults, **options}
    )
    tokens: list[list[int]] = tokens_BT.tolist()
    return tokens


@torch.no_grad()
def forward(model: PreTrainedModel, cache: Cache, ids_BT: Tensor, **options: Any) -> Tensor:
    """Logits of a forward without generate()."""
    logits: Tensor = model(input_ids=ids_BT, past_key_values=cache, **options).logits
    return logits


def receipt_of(keep: KeepCache) -> Receipt:
    """The receipt of the last call, of which there was one."""
    assert keep.last_receipt is not None
    return keep.last_receipt


def known_tokens(keep: KeepCache, ids_BT: Tensor) -> int:
    """What the cache knows of the first row."""
    return keep.coverage(ids_BT[0]).known_tokens
