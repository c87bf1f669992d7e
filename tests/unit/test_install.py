"""Installing a model: what is measured, what is allocated, and that the model stays as it was."""

from typing import Any

import pytest
import torch

from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.engine import Engine
from kvkeep.errors import UnsupportedModelError
from kvkeep.hf.geometry import measure_geometry
from kvkeep.hf.hooks import decoder_configs
from kvkeep.hf.install import install
from kvkeep.hf.paged_model import Mode
from kvkeep.spec import LayerKind
from kvkeep.testing.oracle import logits_at_all_positions
from kvkeep.testing.tiny_models import build_tiny

PROMPT = list(range(10, 40))


def settings(**options: Any) -> EngineSettings:
    """Small blocks and little memory."""
    chosen: dict[str, Any] = {"block_size": 8, "capacity": "1MB"} | options
    return EngineSettings(**chosen)


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek_v3", "falcon", "qwen3_next"])
def test_the_model_serves_ordinary_forwards_as_before(name: str) -> None:
    """After installing, serving, and a step that failed, logits and configs are what they were."""
    model = build_tiny(name)
    names = [config._attn_implementation for config in decoder_configs(model)]
    before_TV = logits_at_all_positions(model, PROMPT)
    chosen = settings()
    engine = Engine(install(model, chosen), chosen)
    engine.add(PROMPT, SamplingParams(max_tokens=3), CacheOptions())
    while engine.has_work:
        engine.step()
    engine.add(PROMPT[::-1], SamplingParams(max_tokens=3), CacheOptions())
    hook = model.lm_head.register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    hook.remove()

    assert torch.equal(logits_at_all_positions(model, PROMPT), before_TV)
    assert [config._attn_implementation for config in decoder_configs(model)] == names


def _fail(*_args: object) -> None:
    raise ZeroDivisionError


def test_memory_is_what_was_asked_for() -> None:
    """Arenas take at most the capacity, and the cache knows their blocks."""
    installed = install(build_tiny("gemma3"), settings(capacity="300KB", self_test=False))

    num_bytes = sum(arena.num_bytes for arena in installed.arenas.arenas.values())

    assert 290_000 < num_bytes <= 300_000
    assert num_bytes == installed.cache.stats().capacity_bytes
    assert installed.cache.num_blocks() == [
        arena.num_blocks for arena in installed.arenas.arenas.values()
    ]


def test_the_self_test_can_be_switched_off_and_the_mode_forced() -> None:
    """Without it there is no verdict; a forced mode is tested, and refused when it is wrong."""
    model = build_tiny("llama")

    assert install(model, settings(self_test=False)).self_test is None
    assert install(model, settings(self_test=False)).paged.mode is Mode.NATIVE
    hybrid = install(build_tiny("lfm2"), settings(self_test=False))
    assert hybrid.paged.mode is Mode.HYBRID
    assert install(model, settings(mode="dense")).paged.mode is Mode.DENSE
    with pytest.raises(UnsupportedModelError, match=r"deepseek_v3.*native"):
        install(build_tiny("deepseek_v3"), settings(mode="native"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [("full", None, (0, 1, 2), 2, 16, 2, 16)]),
        ("mistral", [("sliding", 12, (0, 1, 2), 2, 16, 2, 16)]),
        ("llama4", [("chunked", 16, (0, 1, 2), 2, 16, 2, 16), ("full", None, (3,), 2, 16, 2, 16)]),
        ("gemma4", [("sliding", 12, (0,), 2, 16, 2, 16), ("full", None, (1,), 2, 32, 2, 32)]),
        ("deepseek_v3", [("full", None, (0, 1, 2), 1, 16, 1, 8)]),
        ("falcon_alibi", [("full", None, (0, 1, 2), 1, 12, 1, 12)]),
        ("lfm2", [("recurrent", None, (0, 2), 0, 0, 0, 0), ("full", None, (1, 3), 2, 16, 2, 16)]),
    ],
)
def test_groups_are_read_from_the_model(name: str, expected: list[tuple[Any, ...]]) -> None:
    """Kind, window, layers and shapes of every group; a layer that reuses K/V is in none."""
    groups = measure_geometry(build_tiny(name), 8).spec.groups

    assert [
        (g.kind.value, g.window, g.layers, g.k_heads, g.k_dim, g.v_heads, g.v_dim) for g in groups
    ] == expected
    assert all((g.state_bytes > 0) == (g.kind is LayerKind.RECURRENT) for g in groups)


def test_latents_are_known_by_their_shape() -> None:
    """One head as wide as the config's rank; one head alone is multi-query attention."""
    (latent,) = measure_geometry(build_tiny("deepseek_v3"), 8).spec.groups
    wider = build_tiny("deepseek_v3", changes={"kv_lora_rank": 24, "qk_rope_head_dim": 24})
    (as_wide,) = measure_geometry(wider, 8).spec.groups
    others = [
        group
        for name in ("llama", "falcon_alibi", "lfm2")
        for group in measure_geometry(build_tiny(name), 8).spec.groups
    ]

    assert latent.is_latent
    assert (as_wide.is_latent, as_wide.k_dim, as_wide.v_dim) == (True, 24, 24)
    assert not any(group.is_latent for group in others)


@pytest.mark.parametrize("kv_format", ["auto", "int8", "int4", "float16"])
def test_the_bytes_of_latents_are_those_allocated(kv_format: str) -> None:
    """What the spec counts is what the arena takes, and the namespace says what is in it."""
    chosen = settings(kv_format=kv_format, kv_exact_layers=(), capacity="300KB", self_test=False)
    installed = install(build_tiny("deepseek_v3"), chosen)
    spec = installed.geometry.spec

    (arena,) = installed.arenas.arenas.values()
    assert arena.num_bytes == arena.num_blocks * 8 * spec.bytes_per_token
    assert installed.namespace.kv_format == spec.kv_format
    # Three layers of a latent of 16 and a rotated part of 8, in float32.
    assert spec.bytes_per_token == 3 * {
        "auto": 96, "int8": 16 + 4 + 32, "int4": 8 + 4 + 32, "float16": 48
    }[kv_format]  # fmt: skip


def test_the_namespace_tells_models_apart() -> None:
    """Other weights, another number type or block size: another namespace; the same again: the same."""
    off = {"self_test": False}
    first = install(build_tiny("llama"), settings(**off)).namespace

    assert install(build_tiny("llama"), settings(**off)).namespace == first
    others = [
        install(build_tiny("llama", seed=1), settings(**off)).namespace,
        install(build_tiny("llama", dtype=torch.bfloat16), settings(**off)).namespace,
        install(build_tiny("llama"), settings(block_size=16, **off)).namespace,
    ]
    assert len({namespace.root_key() for namespace in [first, *others]}) == 4
