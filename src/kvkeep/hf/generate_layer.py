"""How an attention layer of a KeepCache looks to those who look into `Cache.layers`."""

import weakref
from typing import Protocol

from torch import Tensor

__all__ = ["PagedLayer"]


class _Batch(Protocol):
    def dense(self, layer_idx: int) -> tuple[Tensor, Tensor] | None:
        """A copy of one layer's keys and values, [B, K, S, D]; None for an empty batch."""


class PagedLayer:
    """Stands for an attention layer in `Cache.layers`; its K/V are in the arena."""

    is_compileable = False
    is_initialized = True
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, batch: _Batch, layer: int) -> None:
        self._batch = weakref.ref(batch)
        self._layer = layer

    @property
    def keys(self) -> Tensor | None:
        """The batch's keys in this layer, [B, K, S, D]."""
        kv = self._kv()
        return None if kv is None else kv[0]

    @property
    def values(self) -> Tensor | None:
        """The batch's values in this layer, [B, K, S, D]."""
        kv = self._kv()
        return None if kv is None else kv[1]

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def _kv(self) -> tuple[Tensor, Tensor] | None:
        batch = self._batch()
        return None if batch is None else batch.dense(self._layer)
