"""What a number was measured on, and the two floors below which no time can go."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

__all__ = ["Rates", "commit", "machine_facts", "measure_rates", "versions"]

ROOT = Path(__file__).resolve().parents[1]
_CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
)
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine reaches at its best: the floors of a time are bytes and operations over these."""

    read_gb_per_s: float
    bf16_gflop_per_s: float
    fp32_gflop_per_s: float

    def floor_s(self, *, num_bytes: float, operations: float) -> float:
        """The least time for reading so many bytes and doing so many operations in bf16."""
        peak = max(self.bf16_gflop_per_s, self.fp32_gflop_per_s)
        return max(num_bytes / self.read_gb_per_s, operations / peak) / _GIGA


def machine_facts() -> dict[str, Any]:
    """Processor, its instruction sets, cores and memory."""
    name, flags = _cpu()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "flags": {flag: flag in flags for flag in _CPU_FLAGS},
        "has_avx512": "avx512f" in flags,
        "has_amx": any(flag.startswith("amx") for flag in flags),
        "ram_gb": round(psutil.virtual_memory().total / _GIGA, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, of those that are loaded."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers"):
        if name in sys.modules:
            found[name] = str(sys.modules[name].__version__)
    return found


def commit() -> dict[str, Any]:
    """The commit of the working tree, and whether the package was changed since."""
    git = shutil.which("git")
    if git is None:
        return {"commit": None, "is_modified": None}
    head = _output([git, "rev-parse", "HEAD"])
    changed = _output([git, "status", "--porcelain", "--", "src", "benchmarks/*.py", "native"])
    return {"commit": head or None, "is_modified": bool(changed)}


def measure_rates(*, is_quick: bool = False) -> Rates:
    """Reading a large tensor once, and large matrix products; the best of a few."""
    import torch  # the torch-free scripts never come here

    num_floats = (16 if is_quick else 256) * 2**20
    size = 256 if is_quick else 2048
    floats = torch.ones(num_floats)
    seconds_read = _best(floats.sum)
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        left = torch.full((size, size), 0.5, dtype=dtype)
        right = torch.full((size, size), 0.5, dtype=dtype)
        # Weights of a model are read as right.T.
        seconds[dtype] = _best(partial(torch.nn.functional.linear, left, right))
    operations = 2 * size**3
    return Rates(
        read_gb_per_s=num_floats * 4 / seconds_read / _GIGA,
        bf16_gflop_per_s=operations / seconds[torch.bfloat16] / _GIGA,
        fp32_gflop_per_s=operations / seconds[torch.float32] / _GIGA,
    )


def _best(work: Callable[[], object], rounds: int = 5) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.processor() or "unknown", set[str]()
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    return name, flags


def _output(command: list[str]) -> str:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else ""
