"""Calls of transformers' generate() and of a model itself, the same for every cache."""

from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvkeep.arena import ArenaGroups
from kvkeep.cache import Receipt
from kvkeep.codecs import codec_of
from kvkeep.hf import generate_memory
from kvkeep.hf.generate_cache import KeepCache
from kvkeep.hf.geometry import measure_geometry
from kvkeep.spec import KVFormat, with_format

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


def round_trip(kv_format: KVFormat, x_BKTD: Tensor) -> Tensor:
    """What a format makes of each vector."""
    codec = codec_of(kv_format)
    encoded = codec.encode(x_BKTD.reshape(-1, x_BKTD.shape[-1]))
    return codec.decode(encoded, x_BKTD.dtype).view(x_BKTD.shape)


class RoundingCache(DynamicCache):
    """transformers' own cache, with each vector as a format leaves it: the oracle of KeepCache's formats."""

    def __init__(
        self, model: PreTrainedModel, kv_format: str, exact_layers: Collection[int] = ()
    ) -> None:
        super().__init__(config=model.config)
        plain = measure_geometry(model, 8).spec
        spec = with_format(plain, kv_format, exact_layers=exact_layers)
        self.formats = {
            layer: group.formats[at]
            for group in spec.groups
            if group.formats
            for at, layer in enumerate(group.layers)
        }

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round, then do as ever."""
        own = self.formats.get(layer_idx)
        if own is not None:
            key_states = round_trip(own.k, key_states)
            value_states = round_trip(own.v, value_states)
        key, value = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return key, value


def receipt_of(keep: KeepCache) -> Receipt:
    """The receipt of the last call, of which there was one."""
    assert keep.last_receipt is not None
    return keep.last_receipt


def known_tokens(keep: KeepCache, ids_BT: Tensor) -> int:
    """What the cache knows of the first row."""
    return keep.coverage(ids_BT[0]).known_tokens
