"""The recurrent layers of a KeepCache: the running states of a whole batch, and copies of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.arena import RecurrentState
from kvkeep.errors import RequestError
from kvkeep.hf.geometry import text_config
from kvkeep.hf.states import split_states, stack_states

__all__ = ["StateLayers"]


class StateLayers:
    """transformers' own cache layers for recurrent states, by model layer; false when there are none."""

    def __init__(self, model: PreTrainedModel, recurrent_layers: Sequence[int]) -> None:
        num_states = getattr(text_config(model), "number_of_conv_states", 1)
        self._num_states = dict.fromkeys(recurrent_layers, num_states)
        self.layers = stack_states(recurrent_layers, self._num_states, [])
        self.records_past = False

    def __bool__(self) -> bool:
        return bool(self.layers)

    def reset(self) -> None:
        """Be as before the first token."""
        self.records_past = False
        self._become(stack_states(list(self.layers), self._num_states, []))

    def load(self, states: Sequence[RecurrentState]) -> None:
        """Continue from one state for each row."""
        self._become(stack_states(list(self.layers), self._num_states, states))
        if self.records_past:
            self.record_past()

    def split(self, num_rows: int) -> list[RecurrentState]:
        """A copy of the state of each row."""
        rows = split_states(self.layers, num_rows)
        return [
            {name: self._trim(name, state).clone() for name, state in (row or {}).items()}
            for row in rows
        ]

    def select(self, indices: Tensor) -> None:
        """Row `b` becomes what row `indices[b]` was."""
        for layer in self.layers.values():
            layer.reorder_cache(indices)

    def record_past(self) -> None:
        """Keep the inputs of convolutions until `crop` says how many of them count."""
        self.records_past = True
        for layer in self.layers.values():
            layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens; raises RequestError where a state cannot be undone."""
        if tokens_to_remove and not all(layer.is_croppable for layer in self.layers.values()):
            raise RequestError(
                f"crop({tokens_to_remove}) on a model with recurrent states, which cannot be taken "
                "back; use greedy search, sampling or beams with this model"
            )
        for layer in self.layers.values():
            if layer.record_past:
                layer.crop(tokens_to_remove)

    def _become(self, layers: dict[int, Any]) -> None:
        """Take over what `layers` hold; the objects stay, for they are in `Cache.layers`."""
        for at, layer in layers.items():
            vars(self.layers[at]).clear()
            vars(self.layers[at]).update(vars(layer))

    def _trim(self, name: str, state: Tensor) -> Tensor:
        """The part of a convolution's past that the next token reads, at its full width."""
        layer, part = name.split(".")
        if not part.startswith("conv"):
            return state
        width = self.layers[int(layer)].conv_kernel_size[int(part.removeprefix("conv"))]
        state = state[..., -width:]
        return torch.nn.functional.pad(state, (width - state.shape[-1], 0))
