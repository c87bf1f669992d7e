"""What was learnt of a machine and a model, kept for the next start: a small JSON file for each pair.

A file that is old, of another version, from the future or damaged is as good as none: costs are learnt anew.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from secrets import token_hex
from typing import Any

from kvkeep.planning.cost import ComputeCost, ComputeFit, LoadCost
from kvkeep.spec import Span

__all__ = [
    "Calibration",
    "calibration_path",
    "load_calibration",
    "machine_id",
    "measure_compute",
    "save_calibration",
]

_VERSION = 1
_MOST_AGE_S = 30 * 24 * 3600.0
# Clocks of machines that share a folder differ a little.
_MOST_AHEAD_S = 3600.0
_MOST_BYTES = 2**20
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FIELDS = ("model name", "Hardware", "Processor", "cpu model")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Costs to start from: of computing, and of loading by the name of the tier."""

    compute: ComputeCost
    loads: Mapping[str, LoadCost] = field(default_factory=dict)


def machine_id() -> str:
    """What kind of machine this is: processor, architecture, and cores that this process may use."""
    name = platform.processor()
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in _CPU_FIELDS and value.strip():
                name = value.strip()
                break
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    return f"{name or 'unknown'}, {platform.machine()}, {num_cores} cores"


def calibration_path(folder: str | os.PathLike[str], model: str, machine: str) -> Path:
    """The file of a model's fingerprint on a machine."""
    digest = hashlib.sha256(f"{model}\0{machine}".encode(errors="surrogatepass")).hexdigest()
    return Path(folder).expanduser() / f"planner-{digest[:32]}.json"


def load_calibration(
    folder: str | os.PathLike[str],
    model: str,
    machine: str,
    *,
    max_age_s: float = _MOST_AGE_S,
    clock: Callable[[], float] = time.time,
) -> Calibration | None:
    """What was saved for this model and machine, None where that cannot be used."""
    path = calibration_path(folder, model, machine)
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        document = json.loads(path.read_bytes())
        age_s = clock() - document["saved_at"]
        if (document["version"], document["model"], document["machine"]) != (
            _VERSION,
            model,
            machine,
        ) or not -_MOST_AHEAD_S <= age_s <= max_age_s:
            return None
        return Calibration(
            compute=ComputeCost(**_costs(document["compute"])),
            loads={str(n): _load_cost(costs) for n, costs in document["loads"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _log.info("ignoring %s: %s", path, error)
        return None


def save_calibration(
    folder: str | os.PathLike[str],
    model: str,
    machine: str,
    calibration: Calibration,
    *,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Keep it for the next start; False, with a line in the log, where the folder cannot be written to.

    The file is replaced at once: a reader finds the old one or the new one, whoever dies when.
    """
    path = calibration_path(folder, model, machine)
    document = {
        "version": _VERSION,
        "saved_at": clock(),
        "model": model,
        "machine": machine,
        "compute": asdict(calibration.compute),
        "loads": {name: asdict(cost) for name, cost in calibration.loads.items()},
    }
    new = path.with_suffix(f".{token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
        new.replace(path)
    except OSError as error:
        _log.warning("calibration is not kept: %s", error)
        with suppress(OSError):
            new.unlink()
        return False
    return True


def measure_compute(
    run: Callable[[Span], float], *, most_tokens: int, guess: ComputeCost, rounds: int = 3
) -> ComputeCost:
    """The cost of computing, from a few steps: `run` computes a span and returns its seconds.

    Spans are short and long, early and late among `most_tokens` positions. The first round warms up.
    """
    fit = ComputeFit(guess)
    half = most_tokens // 2
    spans = {
        Span(0, 1), Span(most_tokens - 1, most_tokens),
        Span(0, max(1, most_tokens // 16)), Span(most_tokens - max(1, most_tokens // 16), most_tokens),
        Span(0, max(1, half)), Span(half, most_tokens),
    }  # fmt: skip
    for at in range(rounds + 1):
        for span in sorted(spans, key=lambda one: (one.start, one.stop)):
            seconds = run(span)
            if at:
                fit.observe([span], seconds)
    return fit.cost


def _load_cost(costs: Mapping[str, Any]) -> LoadCost:
    cost = LoadCost(**_costs(costs))
    if cost.bytes_per_s <= 0:
        raise ValueError(f"a bandwidth of {cost.bytes_per_s}")
    return cost


def _costs(costs: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers of 0 or more by name; raises ValueError for anything else."""
    for name, value in costs.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not isfinite(value) or value < 0:
            raise ValueError(f"{name} is {value!r}")
    return dict(costs)
