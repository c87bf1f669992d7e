"""Random decoder models, one per architecture, that a CPU runs in milliseconds.

Each model has every layer kind of its family in three or four layers, windows and chunks that a
sequence of 20 tokens already crosses, no token that ends a text early, and weights large enough
that every part of attention moves the logits. Two calls with the same arguments give the same
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
MAX_POSITIONS = 1024
SLIDING_WINDOW = 12
ATTENTION_CHUNK = 16

_MATRIX_STD = 0.16
_LM_HEAD_STD = 0.4
_VECTOR_NOISE_STD = 0.1

_SLIDING, _FULL, _CHUNKED, _LINEAR, _CONV = (
    "sliding_attention",
    "full_attention",
    "chunked_attention",
    "linear_attention",
    "conv",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyArchitecture:
    """How to build one tiny model.

    `settings` go to the config of `model_type`. `normals` maps the end of a parameter's name to the
    mean and standard deviation of its values, for the weights that need their own.
    """

    model_type: str
    settings: Mapping[str, object]
    normals: Mapping[str, tuple[float, float]] = field(default_factory=dict)


# Settings that most families spell the same way: grouped queries (two query heads per KV head) and
# a head size that is not hidden_size / num_attention_heads.
_COMMON: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "initializer_range": _MATRIX_STD,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _settings(*leave_out: str, **own: object) -> dict[str, object]:
    return {name: value for name, value in {**_COMMON, **own}.items() if name not in leave_out}


def _layers(*layer_types: str, **own: object) -> dict[str, object]:
    return {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types), **own}


_SLIDING_AND_FULL = _layers(_SLIDING, _FULL, _SLIDING, _FULL, sliding_window=SLIDING_WINDOW)

_TINY: Mapping[str, TinyArchitecture] = {
    "llama": TinyArchitecture(model_type="llama", settings=_settings()),
    "qwen2": TinyArchitecture(
        # The real models have key biases far larger than the rest of a key.
        model_type="qwen2",
        settings=_settings("head_dim", hidden_size=64),
        normals={"k_proj.bias": (0.0, 3.0)},
    ),
    "qwen3": TinyArchitecture(model_type="qwen3", settings=_settings()),
    "mistral": TinyArchitecture(
        model_type="mistral", settings=_settings(sliding_window=SLIDING_WINDOW)
    ),
    "phi3": TinyArchitecture(
        model_type="phi3",
        settings=_settings(
            "head_dim",
            hidden_size=64,
            original_max_position_embeddings=MAX_POSITIONS,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        ),
    ),
    "gemma2": TinyArchitecture(
        model_type="gemma2",
        settings=_settings(
            **_SLIDING_AND_FULL,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=30.0,
        ),
    ),
    "gemma3": TinyArchitecture(
        model_type="gemma3_text",
        settings=_settings(
            **_layers(_SLIDING, _SLIDING, _FULL, _SLIDING, sliding_window=SLIDING_WINDOW),
            query_pre_attn_scalar=16,
        ),
    ),
    "gemma3n": TinyArchitecture(
        model_type="gemma3n_text",
        settings=_settings(
            **_SLIDING_AND_FULL,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
            final_logit_softcapping=30.0,
        ),
    ),
    "gemma4": TinyArchitecture(
        model_type="gemma4_text",
        settings=_settings(
            **_SLIDING_AND_FULL,
            global_head_dim=32,
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=8,
        ),
    ),
    "gpt2": TinyArchitecture(
        model_type="gpt2",
        settings={
            "vocab_size": VOCAB_SIZE,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
            "initializer_range": _MATRIX_STD,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gpt_oss": TinyArchitecture(
        model_type="gpt_oss",
        settings=_settings(
            **_SLIDING_AND_FULL,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        ),
        normals={"sinks": (0.0, 1.0)},
    ),
    "olmo3": TinyArchitecture(
        model_type="olmo3",
        settings=_settings(
            "head_dim",
            hidden_size=64,
            **_layers(_SLIDING, _SLIDING, _SLIDING, _FULL, sliding_window=SLIDING_WINDOW),
        ),
    ),
    "mixtral": TinyArchitecture(
        model_type="mixtral",
        settings=_settings(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen3_moe": TinyArchitecture(
        model_type="qwen3_moe",
        settings=_settings(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        ),
        normals={"mlp.gate.weight": (0.0, 0.5)},
    ),
    "deepseek_v3": TinyArchitecture(
        model_type="deepseek_v3",
        settings=_settings(
            "head_dim",
            num_key_value_heads=4,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=12,
            v_head_dim=10,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            num_mtp_layers=0,
        ),
    ),
    "llama4": TinyArchitecture(
        model_type="llama4_text",
        settings=_settings(
            num_hidden_layers=4,
            no_rope_layer_interval=4,
            attention_chunk_size=ATTENTION_CHUNK,
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            floor_scale=8,
            attn_scale=0.5,
        ),
    ),
    "cohere2": TinyArchitecture(
        model_type="cohere2",
        settings=_settings(
            "head_dim",
            hidden_size=64,
            **_layers(_SLIDING, _SLIDING, _SLIDING, _FULL, sliding_window=SLIDING_WINDOW),
            logit_scale=1.0,
        ),
    ),
    "falcon": TinyArchitecture(
        model_type="falcon",
        settings=_settings(
            "head_dim",
            "intermediate_size",
            "num_key_value_heads",
            num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        normals={"query_key_value.weight": (0.0, 0.3), "self_attention.dense.weight": (0.0, 0.25)},
    ),
    "falcon_alibi": TinyArchitecture(
        model_type="falcon",
        settings=_settings(
            "head_dim",
            "intermediate_size",
            "num_key_value_heads",
            alibi=True,
            multi_query=True,
            parallel_attn=False,
            bias=True,
        ),
        normals={"query_key_value.weight": (0.0, 0.25), "self_attention.dense.weight": (0.0, 1.0)},
    ),
    "bloom": TinyArchitecture(
        model_type="bloom",
        settings=_settings(
            "head_dim",
            "intermediate_size",
            "num_key_value_heads",
            "num_attention_heads",
            "num_hidden_layers",
            "max_position_embeddings",
            n_layer=3,
            n_head=4,
        ),
        normals={"query_key_value.weight": (0.0, 0.25), "self_attention.dense.weight": (0.0, 0.5)},
    ),
    "qwen3_next": TinyArchitecture(
        model_type="qwen3_next",
        settings=_settings(
            **_layers(_LINEAR, _LINEAR, _FULL, _LINEAR),
            rms_norm_eps=1e-3,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            linear_conv_kernel_dim=4,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        # A slow decay, so that heads remember far and do not amplify rounding noise.
        normals={"conv1d.weight": (0.0, 0.5), "A_log": (-3.0, 1.0), "dt_bias": (0.0, 0.5)},
    ),
    "lfm2": TinyArchitecture(
        model_type="lfm2",
        settings=_settings(
            "head_dim", hidden_size=64, **_layers(_CONV, _FULL, _CONV, _FULL), conv_L_cache=3
        ),
        normals={"conv.conv.weight": (0.0, 0.5)},
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_TINY)


def tiny_config(name: str, **changes: object) -> PreTrainedConfig:
    """The config of the tiny model `name`, with `changes` replacing some of its settings.

    Raises KeyError when `name` is not in ARCHITECTURES.
    """
    architecture = _TINY[name]
    settings: dict[str, Any] = {**architecture.settings, **changes}
    return AutoConfig.for_model(architecture.model_type, **settings)


def build_tiny(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, object] | None = None,
) -> PreTrainedModel:
    """The tiny model `name` in eval mode, without gradients.

    Weights depend on `name` and `seed` only: another `dtype` rounds them, and `changes` of settings
    that keep the shapes (a window, a softcap) leave them as they are. Raises KeyError when `name`
    is not in ARCHITECTURES.
    """
    config = tiny_config(name, **(changes or {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread_weights(model, _TINY[name].normals)
        if dtype != torch.float32:
            exact = model
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.load_state_dict(exact.state_dict())
    model.eval().requires_grad_(requires_grad=False)
    return model


@torch.no_grad()
def _spread_weights(model: PreTrainedModel, own_normals: Mapping[str, tuple[float, float]]) -> None:
    """Draw matrices from a wide normal; add noise to vectors (norms, biases) as initialised."""
    normals = {"lm_head.weight": (0.0, _LM_HEAD_STD), **own_normals}
    for name, parameter in sorted(model.named_parameters()):
        own = next((normal for ending, normal in normals.items() if name.endswith(ending)), None)
        if own is not None:
            mean, std = own
            parameter.normal_(mean, std)
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, _MATRIX_STD)
        else:
            parameter.add_(torch.randn_like(parameter) * _VECTOR_NOISE_STD)
