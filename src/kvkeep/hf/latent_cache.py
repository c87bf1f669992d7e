"""The step cache of multi-head latent attention (MLA): queries are absorbed, latents are read as they lie.

An MLA layer stores a latent c of each token and one rotated key, and expands c into keys and values of every
head by one matrix W. Attention needs no expansion, because q . (W_k c) = (W_k^T q) . c, and the weighted sum
of values is W_v times that of latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Legend: T packed tokens, H query heads, K = 1, D head size, E dims that W makes for a head, R dims of the
latent, N dims of a head that carry no position.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvkeep.attention import AttentionTerms, GroupInputs, NativeAttention
from kvkeep.errors import UnsupportedModelError
from kvkeep.hf.geometry import ModelGeometry
from kvkeep.hf.step_cache import PackedStepCache

__all__ = ["LatentStepCache", "find_expansions", "has_latents"]


def has_latents(model: PreTrainedModel, geometry: ModelGeometry) -> bool:
    """Whether every layer that stores K/V is an MLA layer whose expansion is known."""
    return bool(geometry.places) and set(geometry.places) == set(_expansions(model, geometry))


def find_expansions(model: PreTrainedModel, geometry: ModelGeometry) -> dict[int, Tensor]:
    """The matrix W [H * E, R] of each layer. Raises UnsupportedModelError where one is missing."""
    expansions = _expansions(model, geometry)
    missing = sorted(set(geometry.places) - set(expansions))
    if missing:
        raise UnsupportedModelError(
            f"mode='latent': layers {missing} store no latent that a plain linear layer `kv_b_proj` expands; "
            "use mode='auto'"
        )
    return expansions


def _expansions(model: PreTrainedModel, geometry: ModelGeometry) -> dict[int, Tensor]:
    layer_to_weight: dict[int, Tensor] = {}
    for module in model.modules():
        layer, expansion = getattr(module, "layer_idx", None), getattr(module, "kv_b_proj", None)
        if layer not in geometry.places or not isinstance(expansion, nn.Linear):
            continue
        group = geometry.spec.groups[geometry.places[layer].group]
        expands = group.is_latent and group.k_dim == expansion.in_features
        if expands and getattr(expansion, "bias", None) is None:
            layer_to_weight[layer] = expansion.weight
    return layer_to_weight


class LatentStepCache(PackedStepCache):
    """Segments of many requests in one row: short ones attend to latents, long ones to expanded K/V."""

    backend: NativeAttention

    def __init__(
        self,
        geometry: ModelGeometry,
        backend: NativeAttention,
        groups: Sequence[GroupInputs | None],
        layers: list[Any],
        *,
        layer_to_expansion: Mapping[int, Tensor],
        offsets_T: Tensor | None = None,
    ) -> None:
        super().__init__(geometry, backend, groups, layers, gathers=False, offsets_T=offsets_T)
        self._layer_to_expansion = layer_to_expansion

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [1, K, T, D]; returns what the model is to expand."""
        self.write(layer_idx, key_states, value_states)
        # With no long segment it expands the step's own tokens, which nothing reads.
        has_long = bool(self.inputs(layer_idx).batches)
        return self.read(layer_idx) if has_long else (key_states, value_states)

    def attend(
        self, layer: int, q_1HTD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Attention of the step's queries in a model layer, [1, T, H, D]."""
        inputs = self.inputs(layer)
        assert inputs.paged is not None
        if inputs.paged.items is None:
            return self.backend.attend_gathered(inputs, q_1HTD, (k_1KTD, v_1KTD), terms)
        out_THD = self._attend_absorbed(inputs, layer, q_1HTD[0], terms)
        long = self.backend.attend_gathered_batches(inputs, q_1HTD, (k_1KTD, v_1KTD), terms)
        for batch, part in zip(inputs.batches, long, strict=True):
            out_THD[batch.rows] = part
        return out_THD.unsqueeze(0)

    def _attend_absorbed(
        self, inputs: GroupInputs, layer: int, q_HTD: Tensor, terms: AttentionTerms
    ) -> Tensor:
        """Attention over latents for all rows, those of long segments included, [T, H, E - N]."""
        place = self.geometry.places[layer]
        num_plain = q_HTD.shape[2] - self.geometry.spec.groups[place.group].v_dim
        w_HER = self._layer_to_expansion[layer].unflatten(0, (q_HTD.shape[0], -1))
        q_HTR = q_HTD[..., :num_plain] @ w_HER[:, :num_plain]
        q_THD = torch.cat([q_HTR, q_HTD[..., num_plain:]], dim=-1).transpose(0, 1)
        out_THR = self.backend.attend_latent(inputs, place.group, place.layer, q_THD, terms)
        out_HTV: Tensor = out_THR.transpose(0, 1) @ w_HER[:, num_plain:].transpose(1, 2)
        return out_HTV.transpose(0, 1)
