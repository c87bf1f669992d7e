"""The sides of attention: the kernels on paged K/V, torch on contiguous K/V and on a cache that grows.

Legend: B requests, S positions, T tokens (one a request), H query heads, K key/value heads, D head size.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from benchmarks.paged import BLOCK_SIZE, Heads, PagedKV
from kvkeep.native import ItemsRef, Kernels, SlotsRef

__all__ = ["Case", "Contiguous", "Growing", "Paged", "sdpa"]

_LAYERS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """Requests of one length."""

    heads: Heads
    batch: int
    context: int

    @property
    def what(self) -> str:
        """The case in a line of a table."""
        return f"{self.heads.name}, {self.batch} x {self.context}"

    def kv(self) -> tuple[Tensor, Tensor]:
        """Random keys and values, [B, S, K, D] each."""
        shape = (self.batch, self.context, self.heads.num_kv, self.heads.dim)
        return torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()

    def q_THD(self) -> Tensor:
        """Random queries."""
        return torch.randn(self.batch, self.heads.num_queries, self.heads.dim).bfloat16()

    def copies(self, working_set_mb: int, num_bytes: int) -> int:
        """How often K/V of so many bytes fill the working set."""
        return math.ceil(working_set_mb * 2**20 / num_bytes)


class Paged:
    """The kernels: copies of the requests in layers of an arena, blocks in random places."""

    def __init__(
        self,
        kernels: Kernels,
        case: Case,
        kv_format: str,
        kv: tuple[Tensor, Tensor],
        q_THD: Tensor,
        working_set_mb: int,
    ) -> None:
        num_blocks = case.batch * -(-case.context // BLOCK_SIZE)
        token_bytes = PagedKV(kernels, case.heads, kv_format, 1, 1).token_bytes
        copies = case.copies(working_set_mb, token_bytes * _LAYERS * num_blocks * BLOCK_SIZE)
        self.paged = PagedKV(kernels, case.heads, kv_format, _LAYERS, copies * num_blocks)
        self.tables_BN = list(torch.randperm(num_blocks).chunk(case.batch))
        self.paged.fill(self.tables_BN, *kv)
        self.paged.repeat(num_blocks)
        self._q_THD = q_THD
        self._last_k_TKD, self._last_v_TKD = (one_BSKD[:, -1] for one_BSKD in kv)
        self._items: list[ItemsRef] = []
        self._places: list[SlotsRef] = []
        offsets_T = torch.full((case.batch,), (case.context - 1) % BLOCK_SIZE)
        for copy in range(copies):
            tables_BN = [table_N + copy * num_blocks for table_N in self.tables_BN]
            self._items.append(self.paged.reads(tables_BN, case.context))
            lasts_T = torch.stack([table_N[-1] for table_N in tables_BN])
            self._places.append(self.paged.places(lasts_T, offsets_T))

    def attend(self, copy: int = 0, layer: int = 0) -> Tensor:
        """Attention of one step, [T, H, D]."""
        return self.paged.attend(layer, self._items[copy], self._q_THD)

    def attend_all(self) -> int:
        """Attention of all layers and copies; returns of how many."""
        for copy, layer in product(range(len(self._items)), range(_LAYERS)):
            self.attend(copy, layer)
        return len(self._items) * _LAYERS

    def append_all(self) -> int:
        """The same, the last position written before each attention."""
        for copy, layer in product(range(len(self._items)), range(_LAYERS)):
            self.paged.write(layer, self._places[copy], self._last_k_TKD, self._last_v_TKD)
            self.attend(copy, layer)
        return len(self._items) * _LAYERS


class Contiguous:
    """torch on K/V that lie as it wants them, [B, K, S, D] a layer."""

    def __init__(
        self, case: Case, kv: tuple[Tensor, Tensor], q_THD: Tensor, working_set_mb: int
    ) -> None:
        copies = case.copies(working_set_mb, case.heads.bytes_of(case.batch * case.context))
        k_BKSD, v_BKSD = (one_BSKD.transpose(1, 2).contiguous() for one_BSKD in kv)
        self._kv = [(k_BKSD.clone(), v_BKSD.clone()) for _ in range(copies)]
        self._q_BHTD = q_THD.unsqueeze(2)

    def attend(self, copy: int = 0) -> Tensor:
        """Attention of one step, [T, H, D]."""
        return sdpa(self._q_BHTD, *self._kv[copy])[:, :, 0]

    def attend_all(self) -> int:
        """Attention of all layers and copies; returns of how many."""
        for copy in range(len(self._kv)):
            self.attend(copy)
        return len(self._kv)


class Growing:
    """A DynamicCache that gets one token longer before each attention."""

    def __init__(
        self, case: Case, kv: tuple[Tensor, Tensor], q_THD: Tensor, working_set_mb: int
    ) -> None:
        copies = case.copies(working_set_mb, case.heads.bytes_of(case.batch * case.context))
        k_BKSD, v_BKSD = (one_BSKD.transpose(1, 2) for one_BSKD in kv)
        self._cache = DynamicCache()
        self._num_layers = copies
        for layer in range(copies):
            self._cache.update(k_BKSD[:, :, :-1], v_BKSD[:, :, :-1], layer)
        self._last = (k_BKSD[:, :, -1:], v_BKSD[:, :, -1:])
        self._q_BHTD = q_THD.unsqueeze(2)

    def attend_all(self) -> int:
        """Append and attend in all layers; returns in how many."""
        for layer in range(self._num_layers):
            sdpa(self._q_BHTD, *self._cache.update(*self._last, layer))
        return self._num_layers


def sdpa(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    """What transformers calls for one new token a request, [B, H, T, D]."""
    return F.scaled_dot_product_attention(q_BHTD, k_BKSD, v_BKSD, enable_gqa=True)
