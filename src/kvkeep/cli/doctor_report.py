"""What `kvkeep doctor` finds out about this machine and one model."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvkeep import __version__
from kvkeep.arena import fit_blocks
from kvkeep.cli.doctor_formats import FormatRow, compare_formats
from kvkeep.config import EngineSettings, parse_bytes
from kvkeep.errors import CapacityError, UnsupportedModelError
from kvkeep.hf.fingerprint import longest_context
from kvkeep.hf.format_probe import FormatProbe
from kvkeep.hf.geometry import ModelGeometry, measure_geometry
from kvkeep.hf.install import free_memory_bytes
from kvkeep.hf.kv_formats import asked_formats
from kvkeep.hf.linear import LinearChoice
from kvkeep.hf.load import LoadedModel, load_model
from kvkeep.hf.selftest import SelfTest
from kvkeep.hf.trial_logits import Served
from kvkeep.hf.verdict import judge
from kvkeep.native import Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import GroupSpec, KVSpec, LayerKind

__all__ = ["Environment", "Fit", "Report", "examine", "measure_environment"]

# What the CPU can do that kernels ask for, by the names of /proc/cpuinfo.
_INTERESTING_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """The machine as torch sees it; `free_bytes` is memory free for the cache on the device.

    `kernels` is the instruction set of the CPU kernels, None where `kernels_absent` says why there are none.
    """

    kvkeep: str
    python: str
    torch: str
    device: str
    device_name: str
    num_threads: int
    num_cpus: int
    torch_cpu_capability: str
    cpu_flags: tuple[str, ...]
    free_bytes: int
    kernels: str | None
    kernels_absent: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What so many bytes of cache hold.

    `num_tokens` is None where no layer keeps all positions, so that memory bounds requests and not their
    length. `requests_of` maps a request's tokens to how many such requests can be held at once.
    """

    capacity_bytes: int
    num_tokens: int | None
    requests_of: dict[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The verdict on one model: `self_test` where a mode serves it, else `refusal` with the numbers.

    `spec` has the format asked for. `formats` is empty unless it was asked for; `linears` where there are no
    kernels.
    """

    environment: Environment
    model: str
    architecture: str
    num_parameters: int
    dtype: str
    max_context: int
    spec: KVSpec | None = None
    self_test: SelfTest | None = None
    format_probe: FormatProbe | None = None
    linears: tuple[LinearChoice, ...] = ()
    formats: tuple[FormatRow, ...] = ()
    refusal: str | None = None
    fits: tuple[Fit, ...] = ()
    no_fit: str | None = None


def examine(
    model: str,
    settings: EngineSettings,
    *,
    dtype: str | None,
    device: str | None,
    lengths: Sequence[int],
    with_formats: bool,
    say: Callable[[str], None],
) -> Report:
    """Load `model`, try the modes on its weights, and count what fits; takes no memory for a cache.

    Counts requests of those `lengths` that the model's context has, else of its whole context. With
    `with_formats` every KV format is measured too; `say` is told what is being done. Raises ConfigError when
    the model cannot be loaded, or its K/V cannot have the format asked for.
    """
    loaded = load_model(model, dtype=dtype, device=device)
    parameter = next(loaded.model.parameters())
    environment = measure_environment(parameter.device)
    max_context = longest_context(loaded.model, settings.max_context)
    report = Report(
        environment=environment,
        model=model,
        architecture=type(loaded.model).__name__,
        num_parameters=loaded.model.num_parameters(),
        dtype=str(parameter.dtype).removeprefix("torch."),
        max_context=max_context,
    )
    possible = [length for length in lengths if length <= max_context] or [max_context]
    say(f"trying {model}")
    report = _with_verdict(report, loaded, settings, possible)
    if not with_formats or report.self_test is None:
        return report
    return _with_formats(report, loaded, settings, say)


def measure_environment(device: torch.device) -> Environment:
    """What torch runs on, and how much memory is free there."""
    is_cuda = device.type == "cuda"
    kernels = load_kernels()
    return Environment(
        kvkeep=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        device=str(device),
        device_name=torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        num_threads=torch.get_num_threads(),
        num_cpus=os.cpu_count() or 1,
        torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_flags=_cpu_flags(),
        free_bytes=free_memory_bytes(device),
        kernels=kernels.isa.name.lower() if isinstance(kernels, Kernels) else None,
        kernels_absent=kernels.reason if isinstance(kernels, KernelsAbsent) else None,
    )


def _cpu_flags() -> tuple[str, ...]:
    """Those of `_INTERESTING_FLAGS` that the kernel reports; none where it does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return ()
    for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            found = set(value.split())
            return tuple(flag for flag in _INTERESTING_FLAGS if flag in found)
    return ()


def _with_verdict(
    report: Report, loaded: LoadedModel, settings: EngineSettings, lengths: Sequence[int]
) -> Report:
    try:
        measured = _geometry(loaded, settings).spec
        # What a model that is refused would have stored.
        report = replace(report, spec=asked_formats(measured, settings))
        verdict = judge(loaded.model, settings)
    except UnsupportedModelError as error:
        return replace(report, refusal=str(error))
    spec = verdict.geometry.spec
    report = replace(
        report,
        spec=spec,
        self_test=verdict.self_test,
        format_probe=verdict.format_probe,
        linears=verdict.linears,
    )
    free_bytes = report.environment.free_bytes
    capacities = [parse_bytes(settings.capacity, total_bytes=free_bytes), free_bytes]
    try:
        fits = [_fit(spec, settings, capacity, lengths) for capacity in capacities]
    except CapacityError as error:
        return replace(report, no_fit=str(error))
    return replace(report, fits=tuple(fits))


def _geometry(loaded: LoadedModel, settings: EngineSettings) -> ModelGeometry:
    return measure_geometry(
        loaded.model, settings.block_size, exact_first_block=settings.kv_exact_first_block
    )


def _with_formats(
    report: Report, loaded: LoadedModel, settings: EngineSettings, say: Callable[[str], None]
) -> Report:
    assert report.self_test is not None
    kernels = load_kernels() if report.self_test.with_kernels else None
    served = Served(
        loaded.model,
        _geometry(loaded, settings),
        report.self_test.mode,
        kernels if isinstance(kernels, Kernels) else None,
    )
    capacity = parse_bytes(settings.capacity, total_bytes=report.environment.free_bytes)

    def count_tokens(spec: KVSpec) -> int | None:
        try:
            return _fit(spec, settings, capacity, ()).num_tokens
        except CapacityError:
            return 0

    return replace(report, formats=compare_formats(served, count_tokens, say))


def _fit(spec: KVSpec, settings: EngineSettings, capacity: int, lengths: Sequence[int]) -> Fit:
    num_blocks = fit_blocks(
        spec,
        capacity,
        max_requests=settings.max_requests,
        max_batch_tokens=settings.max_batch_tokens,
    )
    groups = list(zip(spec.groups, num_blocks, strict=False))
    # Of first blocks that lie apart a request has one.
    firsts = num_blocks[len(groups) :]
    keeping_all = [count for group, count in groups if group.kind is LayerKind.FULL]
    return Fit(
        capacity_bytes=capacity,
        num_tokens=min(keeping_all) * spec.block_size if keeping_all else None,
        requests_of={
            length: min(
                [count // _blocks_held(group, spec, length) for group, count in groups] + firsts
            )
            for length in lengths
        },
    )


def _blocks_held(group: GroupSpec, spec: KVSpec, num_tokens: int) -> int:
    """Blocks of a group that a request of so many tokens holds while it decodes."""
    if group.kind is LayerKind.RECURRENT:
        return 1
    if group.window is None:
        return spec.num_blocks(num_tokens)
    # A window can begin and end within a block.
    return min(spec.num_blocks(num_tokens), spec.num_blocks(group.window) + 1)
