"""The tiny models have the parts they are meant to test, and the oracle agrees with generate()."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvkeep.testing.oracle import OracleRun, greedy, logits_at_all_positions
from kvkeep.testing.tiny_models import (
    ARCHITECTURES,
    ATTENTION_CHUNK,
    MAX_POSITIONS,
    SLIDING_WINDOW,
    VOCAB_SIZE,
    build_tiny,
    tiny_config,
)

FULL = {"full_attention": 3}
SLIDING_FULL = {"sliding_attention": 2, "full_attention": 2}
SHARED = {"sliding_attention": 1, "full_attention": 1, "dummy": 2}
LAYER_TYPES: Mapping[str, Mapping[str, int]] = {
    "llama": FULL,
    "qwen2": FULL,
    "qwen3": FULL,
    "mistral": {"sliding_attention": 3},
    "phi3": FULL,
    "gemma2": SLIDING_FULL,
    "gemma3": {"sliding_attention": 3, "full_attention": 1},
    "gemma3n": SHARED,
    "gemma4": SHARED,
    "gpt2": FULL,
    "gpt_oss": SLIDING_FULL,
    "olmo3": {"sliding_attention": 3, "full_attention": 1},
    "mixtral": FULL,
    "qwen3_moe": FULL,
    "deepseek_v3": FULL,
    "llama4": {"chunked_attention": 3, "full_attention": 1},
    "cohere2": {"sliding_attention": 3, "full_attention": 1},
    "falcon": FULL,
    "falcon_alibi": FULL,
    "bloom": FULL,
    "qwen3_next": {"linear_attention": 3, "full_attention": 1},
    "lfm2": {"conv": 2, "full_attention": 2},
}
WINDOWED = [name for name, kinds in LAYER_TYPES.items() if "sliding_attention" in kinds]
# Settings without which attention is another function, and the change that takes them away.
ATTENTION_PARTS: list[tuple[str, Mapping[str, object]]] = [
    *((name, {"sliding_window": MAX_POSITIONS}) for name in WINDOWED),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("llama4", {"attention_chunk_size": MAX_POSITIONS}),
    ("llama4", {"attn_temperature_tuning": False}),
    ("llama4", {"no_rope_layers": [1, 1, 1, 1]}),
]
PROMPT_TOKENS = 30
NEW_TOKENS = 24


def prompt_of(num_tokens: int, seed: int = 7) -> list[int]:
    """Random token ids, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=generator).tolist()


@cache
def model_of(name: str) -> PreTrainedModel:
    """The default tiny model of an architecture; tests only read it."""
    return build_tiny(name)


@cache
def oracle_run_of(name: str) -> OracleRun:
    """The greedy continuation of the standard prompt."""
    return greedy(model_of(name), prompt_of(PROMPT_TOKENS), NEW_TOKENS)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return float((one - other).abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_builds_ready_for_inference(name: str) -> None:
    """A tiny model is in eval mode, in float32, without gradients, and never stops early."""
    model = model_of(name)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert model.config.vocab_size == VOCAB_SIZE
    assert model.generation_config.eos_token_id is None
    assert logits_at_all_positions(model, prompt_of(500)).isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_the_layer_kinds_of_its_family(name: str) -> None:
    """Layer types, windows and chunks are those the family is known for."""
    layer_types, per_layer_kwargs = get_layer_types_and_kwargs(tiny_config(name))
    assert Counter(layer_types) == LAYER_TYPES[name]
    reach = {"sliding_attention": SLIDING_WINDOW, "chunked_attention": ATTENTION_CHUNK}
    for layer_type, layer_kwargs in zip(layer_types, per_layer_kwargs, strict=True):
        assert layer_kwargs.get("sliding_window") == reach.get(layer_type)


def test_the_table_of_layer_kinds_covers_every_architecture() -> None:
    """No architecture escapes the test above."""
    assert tuple(LAYER_TYPES) == ARCHITECTURES


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_the_last_layers_share_the_keys_and_values_of_earlier_ones(name: str) -> None:
    """One layer of each type stores, the last two reuse."""
    assert tiny_config(name).kv_sharing_modes == ["store", "store", "reuse", "reuse"]


def test_gemma4_has_a_head_size_per_layer_type() -> None:
    """Full layers have larger heads than sliding layers."""
    head_dims = [layer.head_dim for layer in tiny_config("gemma4").per_layer_config]
    assert head_dims == [16, 32, 16, 32]


def test_deepseek_v3_caches_latents_and_mixes_dense_and_expert_layers() -> None:
    """The first layer is dense, the others have experts, and latent widths all differ."""
    model = model_of("deepseek_v3")
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True, True]
    config = model.config
    widths = {config.kv_lora_rank, config.qk_rope_head_dim, config.v_head_dim, config.qk_head_dim}
    assert len(widths) == 4


def test_llama4_has_one_layer_without_positions() -> None:
    """The full-attention layer is the one without RoPE."""
    config = tiny_config("llama4")
    assert config.no_rope_layers == [1, 1, 1, 0]
    assert config.layer_types[3] == "full_attention"


def test_falcon_exists_with_rope_and_with_alibi() -> None:
    """Both position schemes, grouped and single KV heads."""
    assert (tiny_config("falcon").alibi, tiny_config("falcon").num_kv_heads) == (False, 2)
    assert tiny_config("falcon_alibi").alibi
    assert tiny_config("falcon_alibi").multi_query


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    """Weights depend on the seed alone, and building leaves the global generator alone."""
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = build_tiny(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = build_tiny(name, seed=1)
    for key, value in model_of(name).state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert not torch.equal(other.lm_head.weight, again.lm_head.weight)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_weights_are_the_float32_weights_rounded(name: str) -> None:
    """A lower precision changes the rounding and nothing else, and the model runs in it."""
    rounded = build_tiny(name, dtype=torch.bfloat16)
    weights = model_of(name).state_dict()
    for key, parameter in rounded.named_parameters():
        assert torch.equal(parameter, weights[key].to(parameter.dtype)), key
    output = rounded(input_ids=torch.tensor([prompt_of(20)]))
    assert output.logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_oracle_agrees_with_generate_and_its_dynamic_cache(name: str) -> None:
    """Encoding everything again and the library's own cache choose the same tokens."""
    run = oracle_run_of(name)
    prompt = torch.tensor([prompt_of(PROMPT_TOKENS)])
    generated = cast(Any, model_of(name)).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert tuple(generated.sequences[0, PROMPT_TOKENS:].tolist()) == run.token_ids
    assert largest_difference(torch.cat(generated.logits), run.logits) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_logits_of_a_greedy_run_are_those_of_one_pass(name: str) -> None:
    """Logits at a position do not depend on what follows it."""
    run = oracle_run_of(name)
    everything = logits_at_all_positions(
        model_of(name), [*prompt_of(PROMPT_TOKENS), *run.token_ids]
    )
    one_pass = everything[PROMPT_TOKENS - 1 : -1]
    assert largest_difference(one_pass, run.logits) < 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_win_clearly_and_vary(name: str) -> None:
    """Rounding noise cannot change the tokens, and a run is not one token repeated."""
    run = oracle_run_of(name)
    assert run.margins.min() > 1e-3
    assert run.margins.median() > 0.1
    assert len(set(run.token_ids)) >= 5


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("changed_position", [0, 15, PROMPT_TOKENS - 2])
def test_earlier_tokens_move_the_last_logits(name: str, changed_position: int) -> None:
    """Losing any part of the context is visible."""
    prompt = prompt_of(PROMPT_TOKENS)
    other = list(prompt)
    other[changed_position] = (other[changed_position] + 1) % VOCAB_SIZE
    model = model_of(name)
    last = logits_at_all_positions(model, prompt)[-1]
    assert largest_difference(last, logits_at_all_positions(model, other)[-1]) > 1e-2


@pytest.mark.parametrize(("name", "changes"), ATTENTION_PARTS)
def test_every_part_of_attention_moves_the_logits(name: str, changes: Mapping[str, object]) -> None:
    """Forgetting a window, a chunk, a softcap or a temperature is visible."""
    prompt = prompt_of(PROMPT_TOKENS)
    without = build_tiny(name, changes=changes)
    last = logits_at_all_positions(model_of(name), prompt)[-1]
    assert largest_difference(last, logits_at_all_positions(without, prompt)[-1]) > 1e-2


@pytest.mark.parametrize(
    ("name", "reach"), [("mistral", SLIDING_WINDOW), ("llama4", ATTENTION_CHUNK)]
)
def test_a_window_or_chunk_changes_nothing_before_its_end(name: str, reach: int) -> None:
    """Full and limited attention are the same function up to the limit, and differ after it."""
    setting = "sliding_window" if name == "mistral" else "attention_chunk_size"
    unlimited = build_tiny(name, changes={setting: MAX_POSITIONS})
    prompt = prompt_of(PROMPT_TOKENS)
    limited_logits = logits_at_all_positions(model_of(name), prompt)
    difference = (limited_logits - logits_at_all_positions(unlimited, prompt)).abs().amax(dim=-1)
    assert difference[:reach].max() < 1e-5
    assert difference[reach:].min() > 1e-3


def test_attention_sinks_move_the_logits_of_gpt_oss() -> None:
    """Forgetting the sink column is visible."""
    without = build_tiny("gpt_oss")
    for layer in without.model.layers:
        layer.self_attn.sinks.fill_(-1e9)
    prompt = prompt_of(PROMPT_TOKENS)
    last = logits_at_all_positions(model_of("gpt_oss"), prompt)[-1]
    assert largest_difference(last, logits_at_all_positions(without, prompt)[-1]) > 1e-2


def test_the_recurrent_models_are_tested_across_a_chunk_of_their_scan() -> None:
    """A chunked linear-attention scan (64 tokens a chunk) and single steps give the same logits."""
    model = model_of("qwen3_next")
    tokens = prompt_of(150)
    whole = logits_at_all_positions(model, tokens)
    prompt, rest = tokens[:130], tokens[130:]
    with torch.inference_mode():
        step = model(torch.tensor([prompt]), use_cache=True)
        for position, token in enumerate(rest, start=len(prompt)):
            step = model(torch.tensor([[token]]), past_key_values=step.past_key_values)
            assert largest_difference(step.logits[0, -1], whole[position]) < 5e-4
