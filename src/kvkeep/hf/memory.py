"""The memory of a model's K/V, and the attention that goes with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from kvkeep.arena import ArenaGroups, NativeWordRows
from kvkeep.attention import AttentionBackend, GatherAttention, NativeAttention
from kvkeep.errors import CapacityError, UnsupportedModelError
from kvkeep.hf.paged_model import Mode
from kvkeep.native import MOST_DIM, Kernels
from kvkeep.spec import KVSpec, LayerKind, words_can_hold

__all__ = ["READS_PAGES", "Memory", "allocate_memory", "claiming", "kernels_can_serve"]

# Modes whose attention reads blocks where they lie, if there are kernels.
READS_PAGES = frozenset({Mode.NATIVE, Mode.LATENT, Mode.HYBRID})

_NO_MEMORY = "can't allocate memory"


@dataclass(frozen=True, slots=True)
class Memory:
    """Arenas and the backend that writes and reads them."""

    arenas: ArenaGroups
    backend: AttentionBackend


def kernels_can_serve(spec: KVSpec, device: torch.device) -> bool:
    """Whether the CPU kernels can hold every group that has K/V."""
    return device.type == "cpu" and all(
        words_can_hold(group, spec.block_size) and max(group.k_dim, group.v_dim) <= MOST_DIM
        for group in spec.groups
        if group.kind is not LayerKind.RECURRENT
    )


@contextmanager
def claiming(capacity: int | str, device: torch.device) -> Iterator[None]:
    """Raise CapacityError where the block asks `device` for more memory than it gives."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU torch has no type of its own for it.
        is_refused = isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY in str(error)
        if not is_refused:
            raise
        raise CapacityError(
            f"capacity={capacity!r} is more memory than there is on {device}; give less (--capacity)"
        ) from error


def allocate_memory(
    spec: KVSpec,
    num_blocks: list[int],
    *,
    mode: Mode,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels | None,
    poison: bool = False,
) -> Memory:
    """Arenas of `num_blocks` blocks a group; `kernels` is None where torch must do everything.

    Words are what the kernels read and what quantised K/V need; rows are what torch reads fastest. Raises
    UnsupportedModelError for a mode that there is not without kernels.
    """
    if mode is Mode.LATENT and kernels is None:
        raise UnsupportedModelError(
            "mode='latent' needs the CPU kernels, which are not in use: see `kvkeep doctor`, or use "
            "mode='auto'"
        )
    reads_pages = kernels is not None and mode in READS_PAGES
    has_formats = any(group.formats for group in spec.groups)
    arenas = ArenaGroups(
        spec,
        num_blocks,
        dtype=dtype,
        device=device,
        poison=poison,
        layout="words" if reads_pages or has_formats else "rows",
        rows_of=None if kernels is None else partial(NativeWordRows, kernels),
    )
    if reads_pages:
        assert kernels is not None
        return Memory(arenas, NativeAttention(arenas, kernels))
    return Memory(arenas, GatherAttention(arenas))
