"""The `past_key_values` of one forward: writes what the model computes, answers what it asks.

Shapes as in attention.base: T packed tokens, K key/value heads, D head size, S positions read, B rows.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DummyLayer

from kvkeep.attention import AttentionBackend, AttentionTerms, GroupInputs
from kvkeep.hf.geometry import ModelGeometry
from kvkeep.spec import LayerKind, Span

__all__ = ["DenseStepCache", "PackedStepCache", "layer_stubs"]


class _PagedLayer:
    """Stands for an attention layer in `Cache.layers`; its K/V are in the arena."""

    is_compileable = False
    is_initialized = True
    is_croppable = False
    supports_early_init = False
    keys = values = None

    def __init__(self, *, is_sliding: bool) -> None:
        self.is_sliding = is_sliding


def layer_stubs(geometry: ModelGeometry) -> list[Any]:
    """What a model finds in `Cache.layers`: made once, since every step looks the same to it."""
    num_layers = max([*geometry.places, *geometry.recurrent_layers]) + 1
    stubs: list[Any] = [DummyLayer() for _ in range(num_layers)]
    for at in set(geometry.places) - geometry.consumers:
        kind = geometry.spec.groups[geometry.places[at].group].kind
        stubs[at] = _PagedLayer(is_sliding=kind is not LayerKind.FULL)
    return stubs


class _StepCache(Cache):
    """What both kinds of step share: the layers a model may look at, and writing."""

    def __init__(
        self,
        geometry: ModelGeometry,
        backend: AttentionBackend,
        groups: Sequence[GroupInputs | None],
        layers: list[Any],
    ) -> None:
        self.geometry = geometry
        self.backend = backend
        self.groups = groups
        super().__init__(layers=layers)

    def inputs(self, layer: int) -> GroupInputs:
        """The inputs of the group in which the model layer's K/V are."""
        inputs = self.groups[self.geometry.places[layer].group]
        assert inputs is not None
        return inputs

    def write(self, layer: int, k_1KTD: Tensor, v_1KTD: Tensor) -> None:
        """Put a model layer's new K/V into the arena."""
        place = self.geometry.places[layer]
        self.backend.write(self.inputs(layer), place.group, place.layer, k_1KTD, v_1KTD)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """All K/V that the step reads in a model layer."""
        place = self.geometry.places[layer]
        return self.backend.read(self.inputs(layer), place.group, place.layer)


class PackedStepCache(_StepCache):
    """Segments of many requests in one row: `update` writes pages, the attention hook reads them.

    With `gathers` the model gets back all K/V that the step reads, for architectures that transform them
    after the cache; else it gets back what it gave.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        backend: AttentionBackend,
        groups: Sequence[GroupInputs | None],
        layers: list[Any],
        *,
        gathers: bool,
        offsets_T: Tensor | None = None,
    ) -> None:
        super().__init__(geometry, backend, groups, layers)
        self._gathers = gathers
        self._offsets_T = offsets_T

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, K, T, D], or [B, K, 1, D] as B packed tokens."""
        k, v = key_states, value_states
        if k.shape[0] > 1:
            k, v = k.transpose(0, 2), v.transpose(0, 2)
        self.write(layer_idx, k, v)
        return self.read(layer_idx) if self._gathers else (key_states, value_states)

    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Attention of the step's queries in a model layer, [1, T, H, D]."""
        inputs, place = self.inputs(layer), self.geometry.places[layer]
        if self._gathers:
            return self.backend.attend_gathered(inputs, q_1HTD, (k_1KTD, v_1KTD), terms)
        return self.backend.attend(
            inputs, place.group, place.layer, q_1HTD, (k_1KTD, v_1KTD), terms
        )

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:  # type: ignore[override]
        """Zero; or, for models that add it to a running index, position minus index of each token."""
        return 0 if self._offsets_T is None else self._offsets_T

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """What a mask would have to cover; none is built."""
        return query_length, 0


class DenseStepCache(_StepCache):
    """One span of one request, for models that attend in their own way: `update` returns dense K/V."""

    def __init__(
        self,
        geometry: ModelGeometry,
        backend: AttentionBackend,
        groups: Sequence[GroupInputs | None],
        layers: list[Any],
        *,
        span: Span,
    ) -> None:
        super().__init__(geometry, backend, groups, layers)
        self._span = span

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the span's K/V; returns those of all positions that it reads, [1, K, S, D]."""
        self.write(layer_idx, key_states, value_states)
        return self.read(layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the span."""
        return self._span.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many positions `update` returns, and the first of them."""
        place = self.geometry.places[layer_idx]
        first = self.geometry.spec.groups[place.group].first_needed(self._span.start)
        return self._span.stop - first, first
