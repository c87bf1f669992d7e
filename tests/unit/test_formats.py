"""KV formats of a model: bytes, names, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from kvkeep.config import EngineSettings
from kvkeep.errors import ConfigError
from kvkeep.spec import (
    FORMAT_NAMES,
    GroupSpec,
    KVFormat,
    KVSpec,
    LayerFormat,
    LayerKind,
    with_format,
    words_can_hold,
)

INT4 = LayerFormat(KVFormat.INT4, KVFormat.INT4)


def group_spec(*layers: int, **changes: Any) -> GroupSpec:
    """A group of full attention with two heads of 128, unless `changes` says otherwise."""
    fields: dict[str, Any] = {
        "name": "full-2x128", "kind": LayerKind.FULL, "layers": layers or (0, 1, 2, 3),
        "k_heads": 2, "k_dim": 128, "v_heads": 2, "v_dim": 128, "itemsize": 2,
    }  # fmt: skip
    return GroupSpec(**(fields | changes))


def kv_spec(*groups: GroupSpec, dtype: str = "bfloat16", block_size: int = 32) -> KVSpec:
    """A model of these groups, or of one."""
    return KVSpec(groups=groups or (group_spec(),), block_size=block_size, dtype=dtype)


def state_spec(*layers: int) -> GroupSpec:
    """A group of recurrent layers."""
    return GroupSpec(name="state", kind=LayerKind.RECURRENT, layers=layers, state_bytes=100)


@pytest.mark.parametrize(
    ("name", "token_bytes"),
    [
        ("float32", 4 * 2 * 2 * 512),
        ("float16", 4 * 2 * 2 * 256),
        ("fp8", 4 * 2 * 2 * 132),
        ("int8", 4 * 2 * 2 * 132),
        ("int4", 4 * 2 * 2 * 68),
        ("k8v4", 4 * 2 * (132 + 68)),
    ],
)
def test_bytes_are_counted_by_hand(name: str, token_bytes: int) -> None:
    """Layers times heads times keys and values, four bytes of metadata for each vector."""
    spec = with_format(kv_spec(), name)

    assert spec.bytes_per_token == token_bytes
    assert spec.block_bytes() == 32 * token_bytes


@pytest.mark.parametrize(
    ("name", "ratio"), [("int4", 3.7), ("int8", 1.9), ("fp8", 1.9), ("k8v4", 2.5)]
)
def test_quantised_formats_save_what_they_promise(name: str, ratio: float) -> None:
    """At a head size of 128, metadata included, against bfloat16."""
    assert kv_spec().bytes_per_token >= ratio * with_format(kv_spec(), name).bytes_per_token


def test_bytes_of_layers_in_different_formats_add_up() -> None:
    """Each layer counts in its own format; widths of keys and values may differ."""
    formats = (INT4, LayerFormat(KVFormat.INT8, KVFormat.FLOAT16), INT4)
    group = group_spec(0, 1, 2, k_dim=192, v_dim=64, formats=formats)

    assert group.bytes_per_token == 2 * 2 * (96 + 4 + 32 + 4) + 2 * (192 + 4 + 128)
    assert group.block_bytes(16) == 16 * group.bytes_per_token


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("short", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")]
)
def test_floats_have_short_names_and_the_models_own_is_auto(
    dtype: str, short: str, name: str
) -> None:
    """Naming the dtype that the model computes in changes nothing, and short names mean the long ones."""
    spec = kv_spec(dtype=dtype)

    assert with_format(spec, short) == with_format(spec, name)
    assert (with_format(spec, name) == spec) == (name == dtype)
    assert with_format(with_format(spec, "int4"), "auto") == spec


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_layers_stay_as_the_model_computes_them(dtype: str) -> None:
    """The chosen layers have the model's dtype, in every group; the others the format."""
    spec = kv_spec(group_spec(0, 2, 4), group_spec(1, 3, 5), dtype=dtype)
    own = LayerFormat(KVFormat(dtype), KVFormat(dtype))

    first, second = with_format(spec, "int4", exact_layers=(0, 5)).groups

    assert first.formats == (own, INT4, INT4)
    assert second.formats == (INT4, INT4, own)


def test_a_group_of_exact_layers_has_no_format() -> None:
    """Without formats means as computed, so that such a group needs no words."""
    spec = kv_spec(group_spec(0, 1), group_spec(2, 3))

    first, second = with_format(spec, "int8", exact_layers=[0, 1]).groups

    assert first == spec.groups[0]
    assert len(second.formats) == 2


@pytest.mark.parametrize(
    ("name", "exact_layers", "text"),
    [
        ("auto", (), "bfloat16"),
        ("bf16", (), "bfloat16"),
        ("fp16", (), "float16"),
        ("fp8", (), "fp8/1"),
        ("int4", (), "int4/1"),
        ("k8v4", (), "k8v4/1"),
        ("int4", (1, 0), "int4/1;0,1=bfloat16"),
        ("int4", (0, 1, 3), "bfloat16;2=int4/1"),
        ("int4", (2, 3), "int4/1;2,3=bfloat16"),
        ("float32", (3,), "float32;3=bfloat16"),
        ("int8", (0, 1, 2, 3), "bfloat16"),
    ],
)
def test_the_name_in_the_namespace_says_every_layers_format(
    name: str, exact_layers: tuple[int, ...], text: str
) -> None:
    """The format of most layers, then the exceptions in order; quantised ones with their version."""
    assert with_format(kv_spec(), name, exact_layers=exact_layers).kv_format == text


def test_names_differ_exactly_where_formats_do() -> None:
    """How layers are divided into groups is not part of the name, what they store is."""
    together = with_format(kv_spec(group_spec(0, 1, 2)), "int4", exact_layers=(1,))
    apart = with_format(kv_spec(group_spec(0, 2), group_spec(1)), "int4", exact_layers=(1,))
    mixed = replace(group_spec(0), formats=(LayerFormat(KVFormat.INT4, KVFormat.FP8),))
    turned = replace(group_spec(0), formats=(LayerFormat(KVFormat.FP8, KVFormat.INT4),))
    half = replace(group_spec(0), formats=(LayerFormat(KVFormat.BFLOAT16, KVFormat.INT8),))

    assert together.kv_format == apart.kv_format == "int4/1;1=bfloat16"
    assert kv_spec(half).kv_format == "bfloat16+int8/1"
    assert kv_spec(mixed).kv_format == "int4+fp8/1"
    assert kv_spec(turned).kv_format == "fp8+int4/1"
    specs = [
        with_format(kv_spec(dtype=dtype), name, exact_layers=layers)
        for dtype in ("float32", "float16", "bfloat16")
        for name in FORMAT_NAMES
        for layers in ((), (0,), (1, 2, 3))
    ]
    stored = {
        tuple(map(str, spec.groups[0].formats or [spec.dtype] * 4)): spec.kv_format
        for spec in specs
    }
    assert len(set(stored.values())) == len(stored)


def test_recurrent_layers_have_no_format_and_no_name() -> None:
    """Their states are left as they are, and only layers with K/V are named."""
    spec = kv_spec(state_spec(0, 2), group_spec(1, 3))

    converted = with_format(spec, "int4")

    assert converted.groups[0] == spec.groups[0]
    assert converted.groups[1].formats == (INT4, INT4)
    assert converted.kv_format == "int4/1"
    assert kv_spec(state_spec(0)).kv_format == "bfloat16"


def test_groups_whose_heads_differ_stay_beside_others() -> None:
    """A latent of one head with rotated parts of another number is named, and kept as computed."""
    latent = group_spec(0, 1, k_heads=1, v_heads=4)
    spec = kv_spec(latent, group_spec(2, 3, 4))

    converted = with_format(spec, "int8")

    assert converted.groups[0] == latent
    assert converted.kv_format == "int8/1;0,1=bfloat16"
    with pytest.raises(ConfigError, match=r"kv_format='int8' needs .*use kv_format='auto'"):
        with_format(kv_spec(latent), "int8")
    assert with_format(kv_spec(latent), "auto") == kv_spec(latent)


def latent_spec(*layers: int) -> GroupSpec:
    """MLA layers of DeepSeek's sizes."""
    return group_spec(*layers, k_heads=1, k_dim=512, v_heads=1, v_dim=64, is_latent=True)


@pytest.mark.parametrize(
    ("name", "text", "token_bytes"),
    [
        ("auto", "bfloat16", 1024 + 128),
        ("fp8", "fp8+bfloat16/1", 512 + 4 + 128),
        ("int8", "int8+bfloat16/1", 512 + 4 + 128),
        ("int4", "int4+bfloat16/1", 256 + 4 + 128),
        ("k8v4", "int8+bfloat16/1", 512 + 4 + 128),
        ("float32", "float32", 2048 + 256),
    ],
)
def test_only_the_latent_of_mla_is_quantised(name: str, text: str, token_bytes: int) -> None:
    """The rotated part stays as computed, in bytes and in the name; other floats are for both."""
    spec = with_format(kv_spec(latent_spec(0, 1)), name)

    assert spec.kv_format == text
    assert spec.bytes_per_token == 2 * token_bytes
    assert with_format(kv_spec(latent_spec(0, 1)), name, exact_layers=(0, 1)).bytes_per_token == (
        2 * 1152
    )


def test_latents_and_other_layers_are_told_apart() -> None:
    """In a model that has both, each has its own, and the name says so."""
    spec = kv_spec(latent_spec(0, 1), group_spec(2, 3, 4))

    assert with_format(spec, "int4").kv_format == "int4/1;0,1=int4+bfloat16/1"
    assert with_format(spec, "int4", exact_layers=(0, 2)).kv_format == (
        "int4/1;0,2=bfloat16;1=int4+bfloat16/1"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            kv_spec(group_spec(k_dim=100)),
            r"kv_format='int8' needs multiples of 8, and k_dim=100 .* full-2x128; use kv_format='auto'",
        ),
        (kv_spec(group_spec(v_dim=4)), r"v_dim=4 is none"),
        (
            kv_spec(block_size=20),
            r"block_size=20 is none .*; use block_size=24 or kv_format='auto'",
        ),
        (kv_spec(block_size=1), r"block_size=1 is none .*; use block_size=8"),
    ],
)
def test_shapes_that_words_cannot_hold_are_refused(spec: KVSpec, message: str) -> None:
    """The error names the field, its value and the remedy; as computed, every shape is fine."""
    with pytest.raises(ConfigError, match=message):
        with_format(spec, "int8")
    assert not words_can_hold(spec.groups[0], spec.block_size)
    assert with_format(spec, "auto") == spec


def test_a_layer_that_keeps_nothing_cannot_be_exact() -> None:
    """Recurrent layers, and layers that are not there, are refused by number."""
    spec = kv_spec(state_spec(0), group_spec(1, 2))

    with pytest.raises(ConfigError, match=r"exact_layers=\[0, 9\] .* choose from \[1, 2\]"):
        with_format(spec, "int4", exact_layers=(9, 1, 0))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int3", "did you mean int"),
        ("bfloat", "did you mean bfloat16"),
        ("?", "choose one of auto"),
    ],
)
def test_an_unknown_format_is_answered_with_the_nearest(name: str, hint: str) -> None:
    """In settings as in the spec."""
    with pytest.raises(ConfigError, match=f"kv_format='{name[0]}.*{hint}" if name != "?" else hint):
        with_format(kv_spec(), name)
    with pytest.raises(ConfigError, match=hint):
        EngineSettings(kv_format=name)


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_settings_take_every_name(name: str) -> None:
    """All names of the spec are names of the setting."""
    assert EngineSettings(kv_format=name).kv_format == name


def test_a_model_of_another_dtype_has_no_format() -> None:
    """A double precision model keeps its own, and is told what to do for another."""
    spec = kv_spec(dtype="float64")

    assert with_format(spec, "auto").kv_format == "float64"
    with pytest.raises(ConfigError, match=r"dtype='float64' .*load the model in float32"):
        with_format(spec, "int4")
