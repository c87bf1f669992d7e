"""The memory behind a KeepCache: geometry, arenas and bookkeeping, sized from one number of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvkeep.arena import ArenaGroups, NativeWordRows, fit_blocks
from kvkeep.blocks import Namespace
from kvkeep.cache import KVCache
from kvkeep.config import EngineSettings
from kvkeep.config.sizes import format_bytes, parse_bytes
from kvkeep.errors import CapacityError, ConfigError, UnsupportedModelError
from kvkeep.hf.fingerprint import position_regime
from kvkeep.hf.format_probe import FormatProbe
from kvkeep.hf.generate_geometry import retain_all
from kvkeep.hf.geometry import ModelGeometry, measure_geometry
from kvkeep.hf.install import free_memory_bytes
from kvkeep.hf.kv_formats import asked_formats, measure_format, needs_measuring
from kvkeep.hf.memory import claiming, kernels_can_serve
from kvkeep.hf.selftest import choose_mode
from kvkeep.hf.trial_logits import Served
from kvkeep.native import Kernels, load_kernels
from kvkeep.spec import BlockId, BlockKey, KVSpec, LayerKind

__all__ = ["DenseMemory", "allocate_memory", "weights_version"]


@dataclass(frozen=True, slots=True)
class DenseMemory:
    """Arenas with one block more than the bookkeeping knows: the last one, which holds zeros.

    `kernels` encode and decode K/V of other formats than the model's own; None where torch does, or nothing
    has to. `format_probe` is None where nothing was to be decided.
    """

    geometry: ModelGeometry
    cache: KVCache
    arenas: ArenaGroups
    root: BlockKey
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels | None
    format_probe: FormatProbe | None


def allocate_memory(
    model: PreTrainedModel, settings: EngineSettings, salt: str | None
) -> DenseMemory:
    """Check and measure the model, then allocate; raises what KeepCache says it raises.

    Of the settings it reads `capacity`, `block_size` and what the K/V formats are.
    """
    _check_model(model)
    parameter = next(model.parameters())
    num_bytes = parse_bytes(settings.capacity, total_bytes=free_memory_bytes(parameter.device))
    geometry = measure_geometry(model, settings.block_size)
    probe = None
    if needs_measuring(asked_formats(geometry.spec, settings), settings):
        # As an engine would serve the model: its own attention would not say which layers are hurt.
        served = Served(model, geometry, choose_mode(model, geometry).mode, None)
        probe = measure_format(served, settings.kv_format)
        settings = replace(settings, kv_exact_layers=probe.exact_layers)
    geometry = retain_all(geometry)
    spec = asked_formats(geometry.spec, settings)
    kernels = _find_kernels(spec, parameter.device)
    num_blocks = _fit_blocks(spec, num_bytes)
    with claiming(settings.capacity, parameter.device):
        arenas = _make_arenas(spec, num_blocks, parameter, kernels)
    namespace = Namespace(
        # Blocks live and die with one model object, whose weights need not be named.
        model=f"{type(model).__name__} in this process",
        positions=position_regime(model),
        kv_format=spec.kv_format,
        block_size=spec.block_size,
        salt=salt or "",
    )
    return DenseMemory(
        geometry=replace(geometry, spec=spec),
        cache=KVCache(spec, num_blocks, arenas),
        arenas=arenas,
        root=namespace.root_key(),
        dtype=parameter.dtype,
        device=parameter.device,
        kernels=kernels,
        format_probe=probe,
    )


def weights_version(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """Changes whenever a weight is replaced or written to in place."""
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    )


def _find_kernels(spec: KVSpec, device: torch.device) -> Kernels | None:
    if not _has_formats(spec) or not kernels_can_serve(spec, device):
        return None
    found = load_kernels()
    return found if isinstance(found, Kernels) else None


def _has_formats(spec: KVSpec) -> bool:
    return any(group.formats for group in spec.groups)


def _fit_blocks(spec: KVSpec, num_bytes: int) -> list[int]:
    """Blocks of each group, those of zeros left out."""
    if num_bytes < 2 * spec.block_bytes():
        raise CapacityError(
            f"capacity={format_bytes(num_bytes)} is less than two blocks of {spec.block_size} tokens "
            f"({format_bytes(2 * spec.block_bytes())}); give more memory or a smaller block_size"
        )
    zeros_bytes = sum(
        group.block_bytes(spec.block_size)
        for group in spec.groups
        if group.kind is not LayerKind.RECURRENT
    )
    return fit_blocks(spec, num_bytes - zeros_bytes, max_requests=1, max_batch_tokens=0)


def _make_arenas(
    spec: KVSpec, num_blocks: Sequence[int], like: Tensor, kernels: Kernels | None
) -> ArenaGroups:
    with_zeros = [
        count + (group.kind is not LayerKind.RECURRENT)
        for count, group in zip(num_blocks, spec.groups, strict=True)
    ]
    # Inference tensors could not be written to outside of inference mode.
    with torch.inference_mode(mode=False), torch.no_grad():
        arenas = ArenaGroups(
            spec,
            with_zeros,
            dtype=like.dtype,
            device=like.device,
            layout="words" if _has_formats(spec) else "rows",
            rows_of=None if kernels is None else partial(NativeWordRows, kernels),
        )
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
