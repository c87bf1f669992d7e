"""What a model says behind every token of some sequences, run over a cache of their own.

This is how paged paths and KV formats are compared on a model's own weights: as they will be served, in few
forwards. Legend: T tokens of all sequences, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.attention import AttentionBackend
from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache import KVCache, Lease
from kvkeep.hf.geometry import ModelGeometry
from kvkeep.hf.memory import allocate_memory, kernels_can_serve
from kvkeep.hf.paged_model import Mode, PagedModel, Work
from kvkeep.native import Kernels
from kvkeep.planning import cut_spans
from kvkeep.spec import KVSpec, Span

__all__ = ["Served", "trial_logits"]


@dataclass(frozen=True, slots=True)
class Served:
    """A model as it would be served: mode, K/V as `geometry` says; `kernels` is None where torch does all."""

    model: PreTrainedModel
    geometry: ModelGeometry
    mode: Mode
    kernels: Kernels | None

    @property
    def is_packed(self) -> bool:
        """Whether one forward computes any spans."""
        return self.mode in (Mode.NATIVE, Mode.LATENT, Mode.GATHER)


def trial_logits(
    served: Served,
    sequences: Sequence[Sequence[int]],
    *,
    chunk: int,
    watch: Callable[[AttentionBackend], AttentionBackend] | None = None,
) -> Tensor:
    """Logits behind every token of the sequences, [T, V], computed in spans of `chunk` tokens.

    Where the mode allows it all spans are in one forward, else they come one after the other. `watch` may put
    something between the model and its memory.
    """
    spec = served.geometry.spec
    parameter = next(served.model.parameters())
    num_blocks = _num_blocks(spec, sequences)
    kernels = served.kernels if kernels_can_serve(spec, parameter.device) else None
    memory = allocate_memory(
        spec,
        num_blocks,
        mode=served.mode,
        dtype=parameter.dtype,
        device=parameter.device,
        kernels=kernels,
    )
    backend = memory.backend if watch is None else watch(memory.backend)
    cache = KVCache(spec, num_blocks, memory.arenas)
    paged = PagedModel(served.model, served.geometry, memory.arenas, backend, served.mode)
    with ExitStack() as stack:
        leases = [stack.enter_context(_lease(cache, ids)) for ids in sequences]
        if served.is_packed:
            return _compute(cache, paged, [(lease, _pieces(lease, chunk)) for lease in leases])
        return torch.cat([_in_turn(cache, paged, lease, chunk) for lease in leases])


def _num_blocks(spec: KVSpec, sequences: Sequence[Sequence[int]]) -> list[int]:
    """Room for all sequences at once, in every class of blocks."""
    needed = sum(spec.num_blocks(len(ids)) for ids in sequences)
    return [needed] * len(spec.block_classes)


def _lease(cache: KVCache, ids: Sequence[int]) -> Lease:
    size = cache.spec.block_size
    root = Namespace(model="trial", positions="", kv_format="", block_size=size).root_key()
    # Nothing is shared: every sequence is computed whole.
    lease = cache.reserve(TokenChain(root, size, ids), read=False, write=False)
    assert lease is not None
    return lease


def _pieces(lease: Lease, chunk: int) -> tuple[Span, ...]:
    (gap,) = lease.gaps
    return tuple(
        Span(start, min(start + chunk, gap.stop)) for start in range(gap.start, gap.stop, chunk)
    )


def _in_turn(cache: KVCache, paged: PagedModel, lease: Lease, chunk: int) -> Tensor:
    rows = []
    while lease.gaps:
        spans = cut_spans(cache.spec, lease.gaps, len(lease.chain), chunk)
        rows.append(_compute(cache, paged, [(lease, spans)]))
    return torch.cat(rows)


def _compute(
    cache: KVCache, paged: PagedModel, parts: Sequence[tuple[Lease, tuple[Span, ...]]]
) -> Tensor:
    for lease, spans in parts:
        has_room = cache.extend(lease, spans)
        assert has_room
    logits_TV = paged.forward([Work(*part, wants_logits=True, wants_all=True) for part in parts])
    for lease, spans in parts:
        cache.commit(lease, spans)
    return logits_TV
