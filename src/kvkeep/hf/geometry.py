"""What a model's KV looks like, learned from its config and from one tiny forward, never from its name."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)

from kvkeep.errors import UnsupportedModelError
from kvkeep.spec import GroupSpec, KVSpec, LayerKind

__all__ = ["LayerPlace", "ModelGeometry", "measure_geometry", "text_config"]

_LAYER_TYPE_TO_KIND = {
    "full_attention": LayerKind.FULL,
    "sliding_attention": LayerKind.SLIDING,
    "chunked_attention": LayerKind.CHUNKED,
    "conv": LayerKind.RECURRENT,
    "linear_attention": LayerKind.RECURRENT,
}
_PROBE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a model layer's K/V are: KV group, and the layer's number within it."""

    group: int
    layer: int


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """The KV spec and which layer reads which place.

    `places` maps a model layer to where its K/V are stored; a layer that reuses another's K/V maps to that
    layer's place, and is in `consumers`. Recurrent layers are in `recurrent_layers`.
    """

    spec: KVSpec
    places: dict[int, LayerPlace]
    consumers: frozenset[int]
    recurrent_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What makes layers one group."""

    kind: LayerKind
    window: int | None
    k_heads: int = 0
    k_dim: int = 0
    v_heads: int = 0
    v_dim: int = 0


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The decoder's config, also of a model that wraps it."""
    return model.config.get_text_config(decoder=True)


def measure_geometry(
    model: PreTrainedModel, block_size: int, *, exact_first_block: bool = False
) -> ModelGeometry:
    """Run a few tokens through the model and read the shapes that its own cache got.

    `exact_first_block` is that of KVSpec. Raises UnsupportedModelError when the model keeps something else
    than keys, values and states.
    """
    config = text_config(model)
    layer_types, layer_kwargs = get_layer_types_and_kwargs(config)
    unknown = sorted(set(layer_types) - set(_LAYER_TYPE_TO_KIND) - {"dummy"})
    if unknown:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has layers of type {', '.join(unknown)}, which kvkeep "
            "cannot cache; use transformers' own cache for it"
        )
    cache = _probe(model, config)
    shape_to_layers: dict[_Shape, list[int]] = {}
    for at, (layer_type, kwargs) in enumerate(zip(layer_types, layer_kwargs, strict=True)):
        if layer_type != "dummy":
            shape = _shape(cache.layers[at], _LAYER_TYPE_TO_KIND[layer_type], kwargs)
            shape_to_layers.setdefault(shape, []).append(at)
    groups = tuple(
        _group(shape, layers, cache, config, next(model.parameters()).dtype)
        for shape, layers in shape_to_layers.items()
    )
    places = {
        layer: LayerPlace(number, within)
        for number, group in enumerate(groups)
        for within, layer in enumerate(group.layers)
    }
    sources = _shared_kv_sources(config)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelGeometry(
        spec=KVSpec(
            groups=groups, block_size=block_size, dtype=dtype, exact_first_block=exact_first_block
        ),
        places=places | {layer: places[source] for layer, source in sources.items()},
        consumers=frozenset(sources),
        recurrent_layers=tuple(
            layer for group in groups if group.kind is LayerKind.RECURRENT for layer in group.layers
        ),
    )


def _probe(model: PreTrainedModel, config: PreTrainedConfig) -> DynamicCache:
    cache = DynamicCache(config=config)
    device = next(model.parameters()).device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] % config.vocab_size
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def _shape(layer: object, kind: LayerKind, kwargs: dict[str, int]) -> _Shape:
    if kind is LayerKind.RECURRENT:
        return _Shape(kind, None)
    keys, values = _kv_of(layer)
    window = kwargs["sliding_window"] if kind is not LayerKind.FULL else None
    return _Shape(kind, window, keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


def _kv_of(layer: object) -> tuple[Tensor, Tensor]:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.dim() != 4:
        raise UnsupportedModelError(
            f"a {type(layer).__name__} got no keys and values in a forward pass, so kvkeep cannot learn "
            "their shape; use transformers' own cache for this model"
        )
    return keys, values


def _group(
    shape: _Shape,
    layers: Sequence[int],
    cache: DynamicCache,
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> GroupSpec:
    state_bytes = 0
    if shape.kind is LayerKind.RECURRENT:
        for at in layers:
            layer = cache.layers[at]
            assert isinstance(layer, LinearAttentionCacheLayerMixin)
            state_bytes += sum(state.nbytes for state in state_tensors(layer).values())
    name = shape.kind.value if shape.window is None else f"{shape.kind.value}-{shape.window}"
    return GroupSpec(
        name=name if shape.k_dim == 0 else f"{name}-{shape.k_heads}x{shape.k_dim}",
        kind=shape.kind,
        layers=tuple(layers),
        window=shape.window,
        k_heads=shape.k_heads,
        k_dim=shape.k_dim,
        v_heads=shape.v_heads,
        v_dim=shape.v_dim,
        is_latent=_is_latent(shape, config),
        itemsize=dtype.itemsize,
        state_bytes=state_bytes,
    )


def _is_latent(shape: _Shape, config: PreTrainedConfig) -> bool:
    """Whether "keys" are MLA latents: one head, as wide as the config says that latents are."""
    rank = getattr(config, "kv_lora_rank", None)
    return (shape.k_heads, shape.k_dim, shape.v_heads) == (1, rank, 1)


def state_tensors(layer: LinearAttentionCacheLayerMixin) -> dict[str, Tensor]:
    """The state tensors of a recurrent layer, by name."""
    named = {f"conv{at}": state for at, state in layer.conv_states.items()}
    named |= {f"recurrent{at}": state for at, state in layer.recurrent_states.items()}
    return {name: state for name, state in named.items() if state is not None}


def _shared_kv_sources(config: PreTrainedConfig) -> dict[int, int]:
    """For each layer that reuses K/V, the layer that stores them: the one of the same type."""
    modes = getattr(config, "kv_sharing_modes", None) or []
    type_to_store = {config.layer_types[at]: at for at, mode in enumerate(modes) if mode == "store"}
    return {
        at: type_to_store[config.layer_types[at]]
        for at, mode in enumerate(modes)
        if mode == "reuse"
    }
