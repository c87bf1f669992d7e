"""Options that several commands have; their defaults are those of the settings themselves."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click

from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.spec import LONG_FORMAT_NAMES

__all__ = [
    "BUNDLED_MODEL",
    "capacity_options",
    "default_of",
    "device_option",
    "dtype_option",
    "format_options",
    "json_option",
    "model_option",
    "model_options",
    "num_threads_for",
    "sampling_options",
    "threads_option",
]

# kvkeep.hf.load.BUNDLED, which cannot be read without loading torch.
BUNDLED_MODEL = "tiny"

_Command = Callable[..., Any]


def default_of(settings: type[EngineSettings | SamplingParams], name: str) -> object:
    """The default of one field of a settings class."""
    default = next(field.default for field in fields(settings) if field.name == name)
    assert default is not MISSING
    return default


def model_options(function: _Command) -> _Command:
    """--model, --dtype, --device and --threads."""
    return _together(model_option, dtype_option, device_option, threads_option)(function)


def num_threads_for(model: str, asked: int | None) -> int | None:
    """Threads of torch: those asked for, or as few as the model can use; None leaves it to torch."""
    return asked or (1 if model == BUNDLED_MODEL else None)


def capacity_options(function: _Command) -> _Command:
    """--capacity and --block-size of the cache."""
    return _together(
        click.option(
            "--capacity",
            default=default_of(EngineSettings, "capacity"),
            show_default=True,
            help='Device memory of the cache: "2GB", "512MiB", or "20%" of what is free.',
        ),
        click.option(
            "--block-size",
            type=int,
            default=default_of(EngineSettings, "block_size"),
            show_default=True,
            help="Tokens in a block.",
        ),
    )(function)


def format_options(function: _Command) -> _Command:
    """--kv-format, --kv-exact-first-block and --kernels of the cache."""
    return _together(
        click.option(
            "--kv-format",
            default=default_of(EngineSettings, "kv_format"),
            show_default=True,
            help=f"How K/V are stored: {', '.join(LONG_FORMAT_NAMES)}. The last four take fewer bytes and "
            "change outputs a little.",
        ),
        click.option(
            "--kv-exact-first-block",
            is_flag=True,
            help="Keep the first block of every sequence as the model computes it, whatever the format.",
        ),
        click.option(
            "--kernels",
            default=default_of(EngineSettings, "kernels"),
            show_default=True,
            help='"auto" uses the compiled CPU kernels where they are installed, "torch" never.',
        ),
    )(function)


def sampling_options(*, max_tokens: object, temperature: object) -> Callable[[_Command], _Command]:
    """How the answer is chosen and when it ends; the two defaults differ between commands."""
    return _together(
        click.option(
            "--max-tokens",
            type=int,
            default=max_tokens,
            show_default=True,
            help="Most tokens of an answer.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=temperature,
            show_default=True,
            help="0 takes the most likely token.",
        ),
        click.option("--seed", type=int, help="Makes the choice repeatable."),
        click.option("--stop", multiple=True, help="Text that ends an answer; repeatable."),
    )


model_option = click.option(
    "--model",
    default=BUNDLED_MODEL,
    show_default=True,
    help="A path, a hub id, or the bundled model.",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of torch.  [default: 1 for the bundled model, which is too small for more]",
)
dtype_option = click.option(
    "--dtype", help='"float32", "bfloat16" or "float16".  [default: the checkpoint\'s]'
)
device_option = click.option(
    "--device", help='"cpu", "cuda", "cuda:1".  [default: CUDA where there is one]'
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."
)


def _together(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    def decorate(function: _Command) -> _Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
