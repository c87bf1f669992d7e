"""KeepCache in a format of its own: what is stored, how much fits, what is measured and refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvkeep.arena import Arena, NativeWordRows, TorchWordRows, WordArena
from kvkeep.errors import ConfigError, UnsupportedModelError
from kvkeep.hf import format_probe, generate_memory
from kvkeep.hf.generate_cache import KeepCache
from kvkeep.native import Kernels, KernelsAbsent, load_kernels
from kvkeep.testing.tiny_models import build_tiny
from tests.generate_calls import (
    PAD_LENGTHS,
    RoundingCache,
    forward,
    generate,
    left_padded,
    poison_freed_blocks,
    prompt_of,
    receipt_of,
    round_trip,
)

BLOCK_SIZE = 8
FORMATS = ("bfloat16", "float16", "fp8", "int8", "int4", "k8v4")


@pytest.fixture
def model() -> PreTrainedModel:
    """A small dense model."""
    return build_tiny("llama")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill freed blocks with NaN."""
    poison_freed_blocks(monkeypatch)


def keep_of(model: PreTrainedModel, kv_format: str, **options: Any) -> KeepCache:
    """A small cache, all layers in the format."""
    chosen: dict[str, Any] = {"capacity": "4MB", "block_size": BLOCK_SIZE} | options
    chosen.setdefault("kv_exact_layers", ())
    return KeepCache(model, kv_format=kv_format, **chosen)


def first_layer(model: PreTrainedModel, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as the model computes them, in the layer that no format has touched yet."""
    cache = DynamicCache(config=model.config)
    forward(model, cache, ids_BT)
    return kv_of(cache, 0)


def kv_of(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, each [B, K, S, D]."""
    held = cache.layers[layer]
    assert isinstance(held, CacheLayerMixin)
    assert held.keys is not None
    assert held.values is not None
    return held.keys, held.values


# --- what is stored -----------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_each_vector_is_what_the_format_makes_of_it(
    name: str, kv_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit; the model reads it back in the very forward that computes it, and ever after."""
    model, ids_BT = build_tiny(name), prompt_of(21, num_rows=2)
    pair = RoundingCache(model, kv_format).formats[0]
    expected = [
        round_trip(own, part)
        for own, part in zip((pair.k, pair.v), first_layer(model, ids_BT), strict=True)
    ]
    keep = keep_of(model, kv_format)
    returned: list[tuple[Tensor, Tensor]] = []
    update = keep.update

    def recording(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        returned.append(update(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(keep, "update", recording)
    forward(model, keep, ids_BT)

    stored = keep.dense(0)
    assert stored is not None
    for first, later, true in zip(returned[0], stored, expected, strict=True):
        assert torch.equal(first, true)
        assert torch.equal(later, true)


def test_latents_are_quantised_and_their_rotated_part_is_not() -> None:
    """An error of the rotated part would be in every head; it is a small part of the bytes."""
    model, ids_BT = build_tiny("deepseek_v3"), prompt_of(21)
    latent, rotated = first_layer(model, ids_BT)
    keep = keep_of(model, "int4")
    forward(model, keep, ids_BT)

    stored = keep.dense(0)
    assert stored is not None
    assert torch.equal(stored[1], rotated)
    assert not torch.equal(stored[0], latent)


def test_exact_layers_are_as_the_model_computes_them(model: PreTrainedModel) -> None:
    """The others have the format."""
    ids_BT = prompt_of(21)
    keep = keep_of(model, "int4", kv_exact_layers=(0,))
    theirs = RoundingCache(model, "int4", exact_layers=(0,))
    forward(model, keep, ids_BT)
    forward(model, theirs, ids_BT)

    for layer in range(3):
        stored = keep.dense(layer)
        assert stored is not None
        torch.testing.assert_close(stored[0], kv_of(theirs, layer)[0])
    exact = keep.dense(0)
    assert exact is not None
    assert torch.equal(exact[0], first_layer(model, ids_BT)[0])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_padding_columns_are_zeros(model: PreTrainedModel, kv_format: str) -> None:
    """In the words of every format."""
    ids_BT, mask_BT = left_padded()
    keep = keep_of(model, kv_format)
    generate(model, ids_BT, attention_mask=mask_BT, past_key_values=keep)

    for row, length in enumerate(PAD_LENGTHS):
        pad = mask_BT.shape[1] - length
        for part in keep.dense(0) or ():
            assert (part[row, :, :pad] == 0).all()
            assert (part[row, :, pad:] != 0).any(dim=-1).all()


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "int4", "k8v4"])
def test_kernels_and_torch_store_the_same(
    model: PreTrainedModel, kv_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are kernels they encode and decode; without, torch does, with the same bits."""
    if not isinstance(load_kernels(), Kernels):
        pytest.skip("the compiled kernels are not installed")
    ids_BT = prompt_of(29)
    fast = keep_of(model, kv_format)
    monkeypatch.setattr(generate_memory, "load_kernels", lambda: KernelsAbsent("not here"))
    slow = keep_of(model, kv_format)
    for keep, kind in ((fast, NativeWordRows), (slow, TorchWordRows)):
        for arena in keep._memory.arenas.arenas.values():
            assert isinstance(arena, WordArena)
            assert type(arena._rows) is kind
        generate(model, ids_BT, past_key_values=keep)

    for layer in range(3):
        for own, other in zip(fast.dense(layer) or (), slow.dense(layer) or (), strict=True):
            assert torch.equal(own, other)


def test_kernels_use_as_many_threads_as_torch(model: PreTrainedModel) -> None:
    """Also when torch's number changes while the cache lives."""
    keep, before = keep_of(model, "int8"), torch.get_num_threads()
    kernels = keep._memory.kernels
    if kernels is None:
        pytest.skip("the compiled kernels are not installed")
    try:
        for num_threads in (2, 1):
            torch.set_num_threads(num_threads)
            forward(model, keep, prompt_of(5))
            assert kernels.num_threads == num_threads
    finally:
        torch.set_num_threads(before)


# --- memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "lfm2"])
@pytest.mark.parametrize("kv_format", ["bfloat16", "int8", "int4"])
def test_a_format_holds_more_tokens_in_the_same_memory(name: str, kv_format: str) -> None:
    """Bytes allocated are those that the spec counts, and within the capacity."""
    model, capacity = build_tiny(name), 400_000
    plain = KeepCache(model, capacity=capacity, block_size=BLOCK_SIZE)
    keep = keep_of(model, kv_format, capacity=capacity)
    spec, arenas = keep._memory.geometry.spec, keep._memory.arenas
    assert spec.bytes_per_token < plain._memory.geometry.spec.bytes_per_token

    num_bytes = 0
    for at, arena in arenas.arenas.items():
        block_bytes = spec.groups[at].block_bytes(BLOCK_SIZE)
        assert arena.num_bytes == arena.num_blocks * block_bytes
        num_bytes += arena.num_bytes
        # A share of it goes to states.
        assert arena.num_blocks > 1.2 * plain._memory.arenas.arenas[at].num_blocks
    assert num_bytes <= capacity
    assert keep.stats().capacity_bytes <= capacity


def test_memory_stays_within_capacity(model: PreTrainedModel) -> None:
    """Twenty prompts through a cache for a few: old blocks make room, and every answer is right."""
    keep = keep_of(model, "int8", capacity=60_000)
    for seed in range(20):
        ids_BT = prompt_of(100, seed)
        truth = generate(model, ids_BT, past_key_values=RoundingCache(model, "int8"))

        assert generate(model, ids_BT, past_key_values=keep) == truth
        assert keep.stats().capacity_bytes <= 60_000
        assert keep.verify().problems == ()
    assert keep.stats().groups[0].num_evictions > 100


def test_formats_never_meet(model: PreTrainedModel) -> None:
    """The same text has other names in another format, and with other exact layers."""
    keeps = [
        keep_of(model, "auto"),
        keep_of(model, "int8"),
        keep_of(model, "int4"),
        keep_of(model, "int4", kv_exact_layers=(1,)),
    ]

    assert len({keep._memory.root for keep in keeps}) == len(keeps)


def test_the_models_own_dtype_is_no_format(model: PreTrainedModel) -> None:
    """Naming it stores rows as ever, and measures nothing."""
    keep = KeepCache(model, block_size=BLOCK_SIZE, kv_format="float32")

    assert keep._memory.kernels is None
    assert all(isinstance(arena, Arena) for arena in keep._memory.arenas.arenas.values())
    assert keep.format_probe is None
    assert keep._memory.geometry.spec.kv_format == "float32"


# --- what is measured and refused ---------------------------------------------------------


def biased_model(*layers: int) -> PreTrainedModel:
    """A tiny Qwen2 of four layers, some of which have key biases that dwarf the rest of a key."""
    model = build_tiny("qwen2", changes={"num_hidden_layers": 4})
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.bias.mul_(40.0 if at in layers else 0.1)
        layer.self_attn.q_proj.weight.mul_(0.25)
        layer.self_attn.q_proj.bias.mul_(0.0)
    return model


def test_a_quantised_format_is_measured_where_the_cache_is_made() -> None:
    """A layer that cannot bear it stays exact, as with an engine, and the cache says what it found."""
    keep = KeepCache(biased_model(0), block_size=BLOCK_SIZE, kv_format="int4")

    probe = keep.format_probe
    assert probe is not None
    assert 0 in probe.exact_layers
    assert probe.kld <= probe.limit < probe.whole_kld
    numbers = ",".join(map(str, probe.exact_layers))
    assert keep._memory.geometry.spec.kv_format == f"int4/1;{numbers}=float32"


def test_a_format_that_ruins_a_model_is_refused() -> None:
    """Unless it is asked for with the layers that stay exact, which measures nothing."""
    model = biased_model(0, 1, 2, 3)

    with pytest.raises(UnsupportedModelError, match=r"kv_format='int4' .* kv_exact_layers=\(\)"):
        KeepCache(model, block_size=BLOCK_SIZE, kv_format="int4")

    assert not model._forward_pre_hooks
    assert keep_of(model, "int4").format_probe is None


@pytest.mark.parametrize("name", ["gemma3n", "llama4", "deepseek_v3", "qwen3_next", "bloom"])
def test_every_kind_of_model_can_be_measured(name: str) -> None:
    """Windows, shared layers, chunks, latents, states and ALiBi; the model stays as it was."""
    model = build_tiny(name, changes={"hidden_size": 64} if name == "bloom" else None)
    before = forward(model, DynamicCache(config=model.config), prompt_of(30))

    keep = KeepCache(model, block_size=BLOCK_SIZE, kv_format="int8")

    probe = keep.format_probe
    assert probe is not None
    assert probe.noise_kld < 1e-5 < probe.whole_kld < 0.05
    assert torch.equal(forward(model, DynamicCache(config=model.config), prompt_of(30)), before)


def test_nothing_is_measured_where_nothing_is_to_be_decided(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No quantised format, or layers that were named: no forwards."""
    monkeypatch.setattr(format_probe, "trial_logits", None)

    assert KeepCache(model, block_size=BLOCK_SIZE).format_probe is None
    assert KeepCache(model, block_size=BLOCK_SIZE, kv_format="bfloat16").format_probe is None
    assert keep_of(model, "int4").format_probe is None
    assert keep_of(model, "int4", kv_exact_layers=(2,)).format_probe is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "int3"}, "kv_format='int3' is unknown; did you mean int"),
        ({"kv_format": "int8", "block_size": 20}, "block_size=20 is none .*; use block_size=24"),
        ({"kv_exact_layers": [0]}, r"kv_exact_layers=\[0\] is no tuple of layer numbers"),
        ({"kv_format": "int8", "kv_exact_layers": (7,)}, r"exact_layers=\[7\] keep no K/V"),
    ],
)
def test_settings_are_checked_as_those_of_an_engine(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    """Each error names its field, its value and the remedy."""
    with pytest.raises(ConfigError, match=message):
        KeepCache(model, capacity="4MB", **options)


def test_reuse_goes_on_across_calls(model: PreTrainedModel) -> None:
    """A longer prompt computes only what is new."""
    keep, ids_BT = keep_of(model, "int4"), prompt_of(32)
    generate(model, ids_BT, past_key_values=keep)
    longer_BT = torch.cat([ids_BT, prompt_of(9, seed=1)], dim=1)
    truth = generate(model, longer_BT, past_key_values=RoundingCache(model, "int4"))

    assert generate(model, longer_BT, past_key_values=keep) == truth
    assert receipt_of(keep).reused_tokens == 32
