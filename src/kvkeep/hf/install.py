"""From a loaded model to a cache and a way to run the model over it."""

from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from kvkeep.arena import ArenaGroups, fit_blocks
from kvkeep.attention import GatherAttention
from kvkeep.blocks import Namespace
from kvkeep.cache import KVCache
from kvkeep.config import EngineSettings, parse_bytes
from kvkeep.hf.fingerprint import longest_context, model_fingerprint, position_regime
from kvkeep.hf.geometry import ModelGeometry, measure_geometry, text_config
from kvkeep.hf.paged_model import Mode, PagedModel
from kvkeep.hf.selftest import SelfTest, choose_mode

__all__ = ["InstalledModel", "free_memory_bytes", "install"]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model, its cache, and the verdict of the self-test (None when it was switched off)."""

    cache: KVCache
    arenas: ArenaGroups
    paged: PagedModel
    geometry: ModelGeometry
    namespace: Namespace
    max_context: int
    vocab_size: int
    self_test: SelfTest | None


def install(model: PreTrainedModel, settings: EngineSettings) -> InstalledModel:
    """Measure, test and give memory to `model`; the model itself stays as it is.

    Raises UnsupportedModelError when it cannot be served right, CapacityError when memory is too small.
    """
    model.eval()
    geometry = measure_geometry(model, settings.block_size)
    spec = geometry.spec
    self_test = choose_mode(model, geometry, settings.mode) if settings.self_test else None
    mode = self_test.mode if self_test else _untested_mode(geometry, settings.mode)
    parameter = next(model.parameters())
    capacity = parse_bytes(settings.capacity, total_bytes=free_memory_bytes(parameter.device))
    num_blocks = fit_blocks(
        spec,
        capacity,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
    arenas = ArenaGroups(
        spec, num_blocks, dtype=parameter.dtype, device=parameter.device, poison=settings.poison
    )
    return InstalledModel(
        cache=KVCache(spec, num_blocks, arenas, policy=settings.policy),
        arenas=arenas,
        paged=PagedModel(model, geometry, arenas, GatherAttention(arenas), mode),
        geometry=geometry,
        namespace=Namespace(
            model=model_fingerprint(model),
            positions=position_regime(model),
            kv_format=spec.dtype,
            block_size=spec.block_size,
        ),
        max_context=longest_context(model, settings.max_context),
        vocab_size=text_config(model).vocab_size,
        self_test=self_test,
    )


def free_memory_bytes(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _untested_mode(geometry: ModelGeometry, asked: str) -> Mode:
    if asked != "auto":
        return Mode(asked)
    return Mode.HYBRID if geometry.recurrent_layers else Mode.NATIVE
