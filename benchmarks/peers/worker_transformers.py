"""transformers with a DynamicCache: the loop inside `generate`, and nothing around it.

Legend: B requests, S positions, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.peers.protocol import Filled, Opening, Options, serve
from benchmarks.sides import DecodeLoop

_HOW = "random K/V"


class TransformersEngine:
    """A model whose K/V are bfloat16 and contiguous, joined anew with `torch.cat` in every step."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        model = AutoModelForCausalLM.from_pretrained(str(options.model), dtype=torch.bfloat16)
        assert isinstance(model, PreTrainedModel)
        self._model = model.eval()
        self.vocabulary: int = model.config.vocab_size
        self._loop: DecodeLoop | None = None
        self._prefix: list[int] = []
        self._prefix_cache: DynamicCache | None = None

    def describe(self) -> dict[str, str]:
        return {
            "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "precision": "bf16 weights, bf16 K/V",
            "fills": "random",
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        outputs = []
        for ids in prompts:
            loop = DecodeLoop(self._model, [ids])
            tokens = [loop.next_B1.item()]
            while len(tokens) < num_tokens:
                loop.step()
                tokens.append(loop.next_B1.item())
            outputs.append([int(token) for token in tokens])
        return outputs

    def open(self, opening: Opening) -> Filled:
        prompts = opening.prompts(self.vocabulary, is_shared=False)
        cache = self._random_cache(opening.batch, opening.context, opening.seed)
        self._loop = DecodeLoop(self._model, [ids[-1:] for ids in prompts], cache)
        layers: Any = cache.layers
        kv_bytes = sum(int(x.nbytes) for layer in layers for x in (layer.keys, layer.values))
        return Filled(how=_HOW, is_shared=False, kv_bytes=kv_bytes)

    def step(self) -> None:
        assert self._loop is not None
        self._loop.step()

    def close(self) -> None:
        self._loop = None

    def warm(self, prefix: Sequence[int]) -> str:
        self._prefix = list(prefix)
        self._prefix_cache = self._random_cache(1, len(prefix), 0)
        return f"{_HOW}, cropped to the prefix and used again"

    def first_token(self, prompt: Sequence[int]) -> None:
        cache, known = DynamicCache(config=self._model.config), 0
        if self._prefix_cache is not None and list(prompt[: len(self._prefix)]) == self._prefix:
            cache, known = self._prefix_cache, len(self._prefix)
            num_more = cache.get_seq_length() - known
            if num_more:
                cache.crop(-num_more)
        DecodeLoop(self._model, [list(prompt[known:])], cache)

    def _random_cache(self, batch: int, num_positions: int, seed: int) -> DynamicCache:
        """Each request has the same random rows as the one before it, one position further."""
        config = self._model.config
        generator = torch.Generator().manual_seed(seed)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            k_BKSD, v_BKSD = (
                _rolled(
                    torch.randn(
                        config.num_key_value_heads,
                        num_positions,
                        config.head_dim,
                        generator=generator,
                    ).bfloat16(),
                    batch,
                )
                for _ in range(2)
            )
            cache.update(k_BKSD, v_BKSD, layer)
        return cache


def _rolled(x_KSD: Tensor, num_rows: int) -> Tensor:
    return torch.stack([x_KSD.roll(row, dims=1) for row in range(num_rows)])


if __name__ == "__main__":
    serve(TransformersEngine)
