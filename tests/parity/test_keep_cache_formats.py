"""generate() with a KeepCache in every format against transformers' own cache whose K/V were rounded alike.

The matrix is {models} x {formats} x {strategies of generate} x {cold, warm}. Freed blocks hold NaN.
"""

from functools import cache
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.hf.generate_cache import KeepCache
from kvkeep.testing.tiny_models import build_tiny
from tests.generate_calls import (
    RoundingCache,
    forward,
    generate,
    left_padded,
    poison_freed_blocks,
    prompt_of,
    receipt_of,
)

BLOCK_SIZE = 8
PROMPT_TOKENS = 29
FORMATS = ("bfloat16", "float16", "fp8", "int8", "int4", "k8v4")
# Full attention, windows, sinks, layers that share K/V, MLA latents, ALiBi in the model's own way, states.
NAMES = ("llama", "gemma3", "gpt_oss", "gemma3n", "deepseek_v3", "bloom", "lfm2")
RECURRENT = {"lfm2"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 7},
    "left padding": {},
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill freed blocks with NaN."""
    poison_freed_blocks(monkeypatch)


@cache
def model_of(name: str) -> PreTrainedModel:
    """One of the tiny models, built once."""
    # Heads of 12, which words cannot hold, are bloom's without it.
    return build_tiny(name, changes={"hidden_size": 64} if name == "bloom" else None)


def keep_of(name: str, kv_format: str, **options: Any) -> KeepCache:
    """A cache of a tiny model, all layers in the format."""
    chosen: dict[str, Any] = {"capacity": "4MB", "block_size": BLOCK_SIZE} | options
    chosen.setdefault("kv_exact_layers", ())
    return KeepCache(model_of(name), kv_format=kv_format, **chosen)


def inputs_of(strategy: str) -> tuple[Tensor, dict[str, Any]]:
    """Tokens [B, T] and what generate() is asked for."""
    ids_BT, options = prompt_of(PROMPT_TOKENS), STRATEGIES[strategy]
    if strategy == "prompt lookup":
        ids_BT = ids_BT.repeat(1, 2)
    if strategy == "left padding":
        ids_BT, mask_BT = left_padded()
        options = {"attention_mask": mask_BT}
    return ids_BT, options


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("name", "kv_format"),
    [(name, kv_format) for name in NAMES for kv_format in ("int8", "int4")]
    + [("llama", kv_format) for kv_format in FORMATS if kv_format not in ("int8", "int4")],
)
def test_generate_gives_the_tokens_of_rounded_kv(name: str, kv_format: str, strategy: str) -> None:
    """However a batch came about and whatever was reused."""
    model = model_of(name)
    if strategy == "prompt lookup" and model._is_stateful:
        pytest.skip("transformers refuses assisted generation with models that carry a state")
    ids_BT, options = inputs_of(strategy)
    expected = generate(model, ids_BT, past_key_values=RoundingCache(model, kv_format), **options)
    keep = keep_of(name, kv_format)
    for _ in range(2):
        assert generate(model, ids_BT, past_key_values=keep, **options) == expected
        assert keep.verify().problems == ()

    if name not in RECURRENT and (name, strategy) != ("bloom", "left padding"):
        assert receipt_of(keep).reused_tokens > 0
    keep.close()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_do_not_depend_on_what_was_reused(name: str, kv_format: str) -> None:
    """A warm forward reads what the cold one has read, so that only rounding of sums differs."""
    keep, ids_BT = keep_of(name, kv_format), prompt_of(PROMPT_TOKENS)
    truth = forward(model_of(name), RoundingCache(model_of(name), kv_format), ids_BT)[:, -1:]
    for _ in range(2):
        keep.reset()
        found = forward(model_of(name), keep, ids_BT, logits_to_keep=1)[:, -1:]

        assert found.shape == truth.shape
        assert (found - truth).norm() <= 2e-3 * truth.norm()
    full_blocks = PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE
    assert receipt_of(keep).reused_tokens == (0 if name in RECURRENT else full_blocks)
    keep.close()
