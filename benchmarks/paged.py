"""K/V in an arena of words and the kernels on it, with nothing of an engine around them.

Legend: B requests, S positions, N blocks, T tokens (one a request), H query heads, K key/value heads, D head
size, W = K * D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import BenchmarkError
from kvkeep.arena import NativeWordRows, Slots, WordArena, native_arena
from kvkeep.native import ItemsRef, Kernels, KernelsAbsent, ReadKind, SlotsRef, load_kernels
from kvkeep.spec import GroupSpec, KVSpec, LayerKind, with_format

__all__ = ["Heads", "PagedKV", "kernels_here"]

BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a layer: query heads, key/value heads, and their size."""

    name: str
    num_queries: int
    num_kv: int
    dim: int

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes of the keys and values of so many tokens of a layer in bf16."""
        return 4 * num_tokens * self.num_kv * self.dim

    def operations(self, num_pairs: int) -> int:
        """Operations for so many pairs of a query token and a position."""
        return 4 * self.num_queries * self.dim * num_pairs


def kernels_here() -> Kernels:
    """The kernels, with torch's number of threads; raises BenchmarkError where there are none."""
    kernels = load_kernels()
    if isinstance(kernels, KernelsAbsent):
        raise BenchmarkError(f"no kernels: {kernels.reason}")
    kernels.num_threads = torch.get_num_threads()
    return kernels


class PagedKV:
    """Blocks of `num_layers` layers, in `kv_format`, and calls of the kernels on one layer."""

    def __init__(
        self, kernels: Kernels, heads: Heads, kv_format: str, num_layers: int, num_blocks: int
    ) -> None:
        own = GroupSpec(
            name="full", kind=LayerKind.FULL, layers=tuple(range(num_layers)), k_heads=heads.num_kv,
            k_dim=heads.dim, v_heads=heads.num_kv, v_dim=heads.dim, itemsize=2,
        )  # fmt: skip
        plain = KVSpec(groups=(own,), block_size=BLOCK_SIZE, dtype="bfloat16")
        self._spec = with_format(plain, kv_format).groups[0]
        self._heads = heads
        self._kernels = kernels
        self._arena = WordArena(
            self._spec,
            BLOCK_SIZE,
            num_blocks,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            rows_of=partial(NativeWordRows, kernels),
        )
        self._arena.storage.zero_()
        self._ref = native_arena(kernels, self._arena)
        self._terms = kernels.terms(heads.dim**-0.5)

    @property
    def num_layers(self) -> int:
        """Layers of a block."""
        return len(self._spec.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return self._spec.bytes_per_token // self.num_layers

    def fill(self, tables_BN: Sequence[Tensor], k_BSKD: Tensor, v_BSKD: Tensor) -> None:
        """Write all positions of the requests, the same in every layer."""
        num_positions = k_BSKD.shape[1]
        position_S = torch.arange(num_positions)
        for table_N, k_SKD, v_SKD in zip(tables_BN, k_BSKD, v_BSKD, strict=True):
            slots = Slots(table_N[position_S // BLOCK_SIZE], position_S % BLOCK_SIZE)
            self._arena.write(0, slots, k_SKD, v_SKD)
        # Layers have one format, so their bytes are alike; layers that are copied cost no encoding.
        layers_NLB = self._arena.storage.unflatten(1, (self.num_layers, -1))
        layers_NLB[:, 1:] = layers_NLB[:, :1]

    def repeat(self, num_blocks: int) -> None:
        """Copy the first `num_blocks` blocks to all that follow them."""
        copies = self._arena.storage.unflatten(0, (-1, num_blocks))
        copies[1:] = copies[:1]

    def stored(self, table_N: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request as the first layer holds them, [K, S, D] each."""
        position_S = torch.arange(num_positions)
        slots = Slots(table_N[position_S // BLOCK_SIZE], position_S % BLOCK_SIZE)
        shape = (num_positions, self._heads.num_kv, self._heads.dim)
        k_SW, v_SW = self._arena.read(0, slots)
        return k_SW.view(shape).transpose(0, 1), v_SW.view(shape).transpose(0, 1)

    def reads(self, tables_BN: Sequence[Tensor], num_positions: int) -> ItemsRef:
        """One query a request, at the last of its positions."""
        num_items, entries = len(tables_BN), [len(table_N) for table_N in tables_BN]
        items = self._kernels.items(
            kind=ReadKind.FULL,
            window=0,
            num_rows=num_items,
            rows_I=torch.arange(num_items, dtype=torch.int32),
            num_queries_I=torch.ones(num_items, dtype=torch.int32),
            starts_I=torch.full((num_items,), num_positions - 1, dtype=torch.int32),
            table_firsts_I=torch.zeros(num_items, dtype=torch.int32),
            table_offsets_I1=torch.tensor([0, *entries], dtype=torch.int32).cumsum(0).int(),
            table_B=torch.cat(list(tables_BN)).int(),
        )
        self._kernels.check_items(self._ref, items)
        return items

    def places(self, blocks_T: Tensor, offsets_T: Tensor) -> SlotsRef:
        """Slots that `write` writes."""
        slots = self._kernels.slots(blocks_T, offsets_T)
        self._kernels.check_slots(self._ref, slots)
        return slots

    def attend(self, layer: int, items: ItemsRef, q_THD: Tensor) -> Tensor:
        """Attention of one layer, [T, H, D]."""
        out_THD = torch.empty_like(q_THD)
        self._kernels.attend(self._ref, layer, items, self._terms, q_THD, out_THD)
        return out_THD

    def write(self, layer: int, slots: SlotsRef, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Keys and values of one layer into their slots."""
        self._kernels.write(self._ref, layer, slots, k_TKD, v_TKD)
