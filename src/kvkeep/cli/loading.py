"""From the options of a command to a loaded model and settings of a request."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from kvkeep.cli.console import working
from kvkeep.cli.options import num_threads_for
from kvkeep.cli.tier_options import load_given, tiers_of
from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.config.sources import LoadedSettings
from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from kvkeep.llm import LLM
    from kvkeep.tiers import TierSettings

__all__ = ["engine_settings", "load_llm", "open_llm", "sampling_params"]


def engine_settings() -> EngineSettings:
    """What the options of the command that runs, the environment and a file ask for."""
    return load_given(click.get_current_context()).engine


def open_llm(options: Mapping[str, Any]) -> "LLM":
    """The model that `model_options` and all settings ask for, in a context; loads torch, which is slow."""
    settings = load_given(click.get_current_context())
    tiers = tiers_of(settings)
    with working(f"loading torch and {options['model']}"):
        return load_llm(options, settings, tiers)


def load_llm(
    options: Mapping[str, Any], settings: LoadedSettings, tiers: "Sequence[TierSettings]"
) -> "LLM":
    """The model that `model_options` ask for, without a word; for any thread."""
    # Not before they are needed: --help and usage errors stay quick.
    import torch

    from kvkeep.llm import LLM

    num_threads = num_threads_for(options["model"], options["threads"])
    if num_threads is not None:
        torch.set_num_threads(num_threads)  # of this process, which serves this model alone
    try:
        return LLM(
            options["model"],
            dtype=options["dtype"],
            device=options["device"],
            settings=settings.engine,
            tiers=tiers,
        )
    except ConfigError as error:
        raise settings.blamed(error) from error


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """What `sampling_options` ask for."""
    names = ("max_tokens", "temperature", "seed", "stop")
    return SamplingParams(**{name: options[name] for name in names})
