"""From the options of a command to a loaded model and settings of a request."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvkeep.cli.console import working
from kvkeep.cli.options import num_threads_for
from kvkeep.config import EngineSettings, SamplingParams

if TYPE_CHECKING:
    from kvkeep.llm import LLM

__all__ = ["engine_settings", "open_llm", "sampling_params"]


def engine_settings(options: Mapping[str, Any]) -> EngineSettings:
    """What `capacity_options` and `format_options` ask for."""
    names = ("capacity", "block_size", "kv_format", "kv_exact_first_block", "kernels")
    return EngineSettings(**{name: options[name] for name in names})


def open_llm(options: Mapping[str, Any]) -> "LLM":
    """The model that `model_options` and those of its settings ask for; loads torch, which is slow."""
    settings = engine_settings(options)
    with working(f"loading torch and {options['model']}"):
        # Not before they are needed: --help and usage errors stay quick.
        import torch

        from kvkeep.llm import LLM

        num_threads = num_threads_for(options["model"], options["threads"])
        if num_threads is not None:
            torch.set_num_threads(num_threads)  # of this process, which serves this command alone
        return LLM(
            options["model"],
            dtype=options["dtype"],
            device=options["device"],
            settings=settings,
        )


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """What `sampling_options` ask for."""
    names = ("max_tokens", "temperature", "seed", "stop")
    return SamplingParams(**{name: options[name] for name in names})
