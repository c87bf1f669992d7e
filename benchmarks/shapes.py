"""Models of real shapes with random weights: what a forward costs does not depend on the weights."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

__all__ = ["SHAPES", "Shape", "build_model", "random_prompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decoder: `has_qk_norm` makes it a Qwen3, else it is a Llama; embeddings are tied."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    has_qk_norm: bool

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def weight_bytes(self, itemsize: int = 2) -> int:
        """Bytes of weights that a step reads: every layer, and the head."""
        return itemsize * (self.layers * self.layer_weights + self.hidden * self.vocabulary)

    def kv_bytes(self, num_tokens: int, itemsize: int = 2) -> int:
        """Bytes of keys and values of so many tokens."""
        return num_tokens * 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def operations(self, start: int, stop: int, num_logits: int = 1) -> int:
        """Operations for the positions `start <= p < stop` of one request."""
        num_tokens = stop - start
        pairs = (start + 1 + stop) * num_tokens // 2
        attention = 4 * self.layers * self.heads * self.head_dim * pairs
        head = 2 * self.hidden * self.vocabulary * num_logits
        return 2 * self.layers * self.layer_weights * num_tokens + attention + head


def _shape(name: str, sizes: tuple[int, ...], context: int, *, has_qk_norm: bool) -> Shape:
    hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary = sizes
    return Shape(
        name=name,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocabulary=vocabulary,
        context=context,
        has_qk_norm=has_qk_norm,
    )


# name, (hidden, layers, heads, K/V heads, head size, intermediate, vocabulary), longest context
SHAPES = {
    shape.name: shape
    for shape in (
        _shape("qwen3-0.6b", (1024, 28, 16, 8, 128, 3072, 151936), 40960, has_qk_norm=True),
        _shape("smollm2-1.7b", (2048, 24, 32, 32, 64, 8192, 49152), 8192, has_qk_norm=False),
        # Llama-3.2-1B
        _shape("llama-1b", (2048, 16, 32, 8, 64, 8192, 128256), 131072, has_qk_norm=False),
        # Llama-3.1-8B, for its sizes: as many weights in memory are for larger machines.
        _shape("llama-8b", (4096, 32, 32, 8, 128, 14336, 128256), 131072, has_qk_norm=False),
        # The bundled model.
        _shape("tiny", (256, 4, 4, 2, 64, 640, 3072), 8192, has_qk_norm=True),
        # So narrow that a forward is almost only Python.
        _shape("thin", (64, 28, 4, 2, 16, 128, 1024), 40960, has_qk_norm=True),
        # For trying the scripts out.
        _shape("micro", (64, 2, 4, 2, 16, 128, 512), 8192, has_qk_norm=True),
    )
}


@lru_cache(maxsize=4)
def build_model(name: str, dtype: torch.dtype, num_layers: int | None = None) -> PreTrainedModel:
    """A model of a shape of SHAPES, kept for the next who asks; `num_layers` builds fewer layers.

    Matrices are normal with variance 1/inputs, so that every layer changes the logits: with small weights
    and a tied embedding the model would repeat its input, and two sides would agree for nothing.
    """
    shape = SHAPES[name]
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": num_layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
    }
    with torch.device("meta"):
        model: PreTrainedModel = (
            Qwen3ForCausalLM(Qwen3Config(**sizes))
            if shape.has_qk_norm
            else LlamaForCausalLM(LlamaConfig(**sizes))
        )
    torch.nn.Module.to(model, dtype=dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    # Its frequencies are no weights, so nothing else fills them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.dtype == dtype
            _fill(parameter, shape, generator)
    return model


def _fill(parameter: torch.Tensor, shape: Shape, generator: torch.Generator) -> None:
    if parameter.dim() == 1:
        parameter.fill_(1.0)
    elif parameter.shape[0] == shape.vocabulary:
        parameter.normal_(std=0.02, generator=generator)
    else:
        parameter.normal_(std=1 / math.sqrt(parameter.shape[1]), generator=generator)


def random_prompt(shape: Shape, num_tokens: int, seed: object) -> list[int]:
    """Token ids that no other seed gives."""
    generator = torch.Generator().manual_seed(hash_of(seed))
    ids: list[int] = torch.randint(shape.vocabulary, (num_tokens,), generator=generator).tolist()
    return ids


def hash_of(seed: object) -> int:
    """The same number for the same seed, in every process."""
    number = 0
    for byte in repr(seed).encode():
        number = (number * 257 + byte + 1) % (2**61 - 1)
    return number
