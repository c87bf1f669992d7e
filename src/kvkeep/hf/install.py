"""From a loaded model to a cache and a way to run the model over it."""

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from kvkeep.arena import ArenaGroups, Payloads, fit_blocks
from kvkeep.blocks import Namespace
from kvkeep.cache import Chooser, Hierarchy, KVCache
from kvkeep.cache.lifetimes import Lifetimes, LifetimeSettings
from kvkeep.config import EngineSettings, parse_bytes
from kvkeep.hf.fingerprint import longest_context, model_fingerprint, position_regime
from kvkeep.hf.format_probe import FormatProbe
from kvkeep.hf.geometry import ModelGeometry, text_config
from kvkeep.hf.linear import LinearChoice
from kvkeep.hf.memory import Memory, allocate_memory, claiming, kernels_can_serve
from kvkeep.hf.paged_model import PagedModel
from kvkeep.hf.selftest import SelfTest
from kvkeep.hf.verdict import Verdict, judge
from kvkeep.native import Kernels, KernelsAbsent
from kvkeep.spec import KVSpec
from kvkeep.tiers import TierSettings
from kvkeep.tiers.floors import open_floors
from kvkeep.tiers.stack import TierStack

__all__ = ["InstalledModel", "free_memory_bytes", "install"]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model, its cache, and the verdict of the self-test (None when it was switched off).

    `kernels`, `linears` and `format_probe` are those of the Verdict. `chooser` decides what to load from
    tiers, None where there are none, or all is loaded.
    """

    cache: KVCache
    arenas: ArenaGroups
    paged: PagedModel
    geometry: ModelGeometry
    namespace: Namespace
    max_context: int
    vocab_size: int
    self_test: SelfTest | None
    kernels: Kernels | KernelsAbsent
    linears: tuple[LinearChoice, ...]
    format_probe: FormatProbe | None
    chooser: Chooser | None = None


def install(
    model: PreTrainedModel, settings: EngineSettings, *, tiers: Sequence[TierSettings] = ()
) -> InstalledModel:
    """Measure, test and give memory to `model`, which outside of a step stays as it is.

    `tiers` are opened below its arenas, nearest first; the cache closes them.

    Raises UnsupportedModelError when it cannot be served right, or not in the format asked for,
    CapacityError when memory is too small, ConfigError when its K/V cannot have that format at all.
    """
    verdict = judge(model, settings)
    spec = verdict.geometry.spec
    device = next(model.parameters()).device
    num_blocks = fit_blocks(
        spec,
        parse_bytes(settings.capacity, total_bytes=free_memory_bytes(device)),
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
    with claiming(settings.capacity, device):
        memory = _allocate(model, verdict, num_blocks, poison=settings.poison)
    below = _open_below(spec, memory.arenas, tiers, settings)
    return InstalledModel(
        cache=KVCache(
            spec,
            num_blocks,
            memory.arenas,
            policy=settings.policy,
            below=below,
            lifetimes=Lifetimes(LifetimeSettings.of(settings)),
        ),
        arenas=memory.arenas,
        paged=PagedModel(model, verdict.geometry, memory.arenas, memory.backend, verdict.mode),
        geometry=verdict.geometry,
        namespace=Namespace(
            model=model_fingerprint(model),
            positions=position_regime(model),
            kv_format=spec.kv_format,
            block_size=spec.block_size,
        ),
        max_context=longest_context(model, settings.max_context),
        vocab_size=text_config(model).vocab_size,
        self_test=verdict.self_test,
        kernels=verdict.kernels,
        linears=verdict.linears,
        format_probe=verdict.format_probe,
        chooser=None if below is None else below.chooser,
    )


def _open_below(
    spec: KVSpec, arenas: ArenaGroups, tiers: Sequence[TierSettings], settings: EngineSettings
) -> Hierarchy | None:
    if not tiers:
        return None
    stack = TierStack(open_floors(tiers))
    chooser = None
    if settings.loading == "measured":
        names = [tier.name for tier in stack.tiers]
        chooser = Chooser(spec, names, step_tokens=settings.max_batch_tokens)
    payloads = Payloads(spec, arenas)
    return Hierarchy(spec, payloads, stack, idle_s=settings.idle_s, chooser=chooser)


def free_memory_bytes(device: torch.device) -> int:
    """Bytes free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _allocate(
    model: PreTrainedModel, verdict: Verdict, num_blocks: list[int], *, poison: bool
) -> Memory:
    spec, parameter = verdict.geometry.spec, next(model.parameters())
    can_serve = kernels_can_serve(spec, parameter.device)
    return allocate_memory(
        spec,
        num_blocks,
        mode=verdict.mode,
        dtype=parameter.dtype,
        device=parameter.device,
        kernels=verdict.usable_kernels if can_serve else None,
        poison=poison,
    )
