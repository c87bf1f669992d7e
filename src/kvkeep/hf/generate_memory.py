"""The memory behind a KeepCache: geometry, arenas and bookkeeping, sized from one number of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.arena import ArenaGroups, fit_blocks
from kvkeep.blocks import Namespace
from kvkeep.cache import KVCache
from kvkeep.config.sizes import format_bytes, parse_bytes
from kvkeep.errors import CapacityError, ConfigError, UnsupportedModelError
from kvkeep.hf.fingerprint import position_regime
from kvkeep.hf.generate_geometry import retain_all
from kvkeep.hf.geometry import ModelGeometry, measure_geometry
from kvkeep.hf.install import free_memory_bytes
from kvkeep.spec import BlockId, BlockKey, KVSpec, LayerKind

__all__ = ["DenseMemory", "allocate_memory", "weights_version"]


@dataclass(frozen=True, slots=True)
class DenseMemory:
    """Arenas with one block more than the bookkeeping knows: the last one, which holds zeros."""

    geometry: ModelGeometry
    cache: KVCache
    arenas: ArenaGroups
    root: BlockKey
    dtype: torch.dtype
    device: torch.device


def allocate_memory(
    model: PreTrainedModel, capacity: int | str, block_size: int, salt: str | None
) -> DenseMemory:
    """Check and measure the model, then allocate; raises what KeepCache says it raises."""
    _check_model(model)
    _check_block_size(block_size)
    geometry = retain_all(measure_geometry(model, block_size))
    spec = geometry.spec
    parameter = next(model.parameters())
    num_bytes = parse_bytes(capacity, total_bytes=free_memory_bytes(parameter.device))
    if num_bytes < 2 * spec.block_bytes():
        raise CapacityError(
            f"capacity={format_bytes(num_bytes)} is less than two blocks of {block_size} tokens "
            f"({format_bytes(2 * spec.block_bytes())}); give more memory or a smaller block_size"
        )
    zeros_bytes = sum(
        group.block_bytes(block_size)
        for group in spec.groups
        if group.kind is not LayerKind.RECURRENT
    )
    num_blocks = fit_blocks(spec, num_bytes - zeros_bytes, max_requests=1, max_batch_tokens=0)
    arenas = _make_arenas(spec, num_blocks, parameter)
    namespace = Namespace(
        # Blocks live and die with one model object, whose weights need not be named.
        model=f"{type(model).__name__} in this process",
        positions=position_regime(model),
        kv_format=spec.dtype,
        block_size=block_size,
        salt=salt or "",
    )
    return DenseMemory(
        geometry=geometry,
        cache=KVCache(spec, num_blocks, arenas),
        arenas=arenas,
        root=namespace.root_key(),
        dtype=parameter.dtype,
        device=parameter.device,
    )


def weights_version(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is replaced or written to in place."""
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    )


def _make_arenas(spec: KVSpec, num_blocks: Sequence[int], like: Tensor) -> ArenaGroups:
    with_zeros = [
        count + (group.kind is not LayerKind.RECURRENT)
        for count, group in zip(num_blocks, spec.groups, strict=True)
    ]
    # Inference tensors could not be written to outside of inference mode.
    with torch.inference_mode(mode=False), torch.no_grad():
        arenas = ArenaGroups(spec, with_zeros, dtype=like.dtype, device=like.device)
        for arena in arenas.arenas.values():
            arena.fill([BlockId(arena.num_blocks - 1)], 0.0)
    return arenas


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"model={type(model).__name__} is not a transformers model; give a PreTrainedModel, the one "
            "inside if it is wrapped"
        )
    if model.training:
        raise ConfigError("model is in training mode; call model.eval() before KeepCache(model)")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise UnsupportedModelError(
            f"model lies on {', '.join(devices)}, and KeepCache keeps everything on one device; move the "
            "model to one device"
        )


def _check_block_size(block_size: object) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ConfigError(f"block_size={block_size!r} is not a positive integer; give at least 1")
