"""Recurrent states between the arena, one request at a time, and a forward, many rows at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from kvkeep.arena import RecurrentState
from kvkeep.hf.geometry import state_tensors

__all__ = ["split_states", "stack_states"]


def stack_states(
    recurrent_layers: Sequence[int], num_states: dict[int, int], rows: Sequence[RecurrentState]
) -> dict[int, Any]:
    """Cache layers of a forward that continues from `rows`: all of them None, or none."""
    layers = {at: LinearAttentionLayer(num_states[at]) for at in recurrent_layers}
    states = [row for row in rows if row is not None]
    assert len(states) in (0, len(rows)), "rows with and without a past do not mix"
    if states:
        for at, layer in layers.items():
            prefix = f"{at}."
            names = [name for name in states[0] if name.startswith(prefix)]
            for name in names:
                # A copy in any case: models update these tensors in place.
                stacked = torch.cat([state[name] for state in states])
                _restore(layer, name.removeprefix(prefix), stacked)
    return layers


def split_states(layers: dict[int, Any], num_rows: int) -> list[RecurrentState]:
    """The state of each row after the forward."""
    rows: list[dict[str, Tensor]] = [{} for _ in range(num_rows)]
    for at, layer in layers.items():
        for name, stacked in state_tensors(layer).items():
            for row, state in enumerate(stacked.split(1)):
                rows[row][f"{at}.{name}"] = state.clone() if num_rows > 1 else state
    return list(rows)


def _restore(layer: LinearAttentionLayer, name: str, stacked: Tensor) -> None:
    if name.startswith("conv"):
        at = int(name.removeprefix("conv"))
        layer.conv_states[at] = stacked
        layer.conv_kernel_size[at] = stacked.shape[-1]
        layer.is_conv_states_initialized[at] = True
        vars(layer).update(dtype=stacked.dtype, device=stacked.device)
    else:
        at = int(name.removeprefix("recurrent"))
        layer.recurrent_states[at] = stacked
        layer.is_recurrent_states_initialized[at] = True
    layer.has_previous_state[at] = True
