"""What every command shares: its two streams, how errors end it, and how numbers are written."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from kvkeep.errors import (
    CapacityError,
    ConfigError,
    KVKeepError,
    RequestError,
    UnsupportedModelError,
)

__all__ = [
    "EXIT_CAPACITY",
    "EXIT_CHECK_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_UNSUPPORTED",
    "EXIT_USAGE",
    "Command",
    "emit_json",
    "exit_code_of",
    "format_seconds",
    "show_error",
    "stderr",
    "stdout",
    "working",
]

EXIT_CHECK_FAILED = 1
EXIT_USAGE = 2
EXIT_UNSUPPORTED = 3
EXIT_CAPACITY = 4
EXIT_INTERRUPTED = 130

# Where a context keeps the value of --debug.
_DEBUG = "kvkeep.debug"
# Libraries read these once, when they are imported.
_QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_CHATTY_LOGGERS = ("transformers", "huggingface_hub", "torch")


class Command(click.Command):
    """A command whose errors are one line and an exit code; `--debug` shows all there is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_keep_debug,
                help="Show tracebacks and what the libraries below have to say.",
            )
        )

    def invoke(self, ctx: click.Context) -> object:
        if ctx.meta[_DEBUG]:
            return super().invoke(ctx)
        try:
            with _quiet():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            show_error("interrupted")
            ctx.exit(EXIT_INTERRUPTED)
        except KVKeepError as error:
            show_error(str(error))
            ctx.exit(exit_code_of(error))


def _keep_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001  click's way
    ctx.meta[_DEBUG] = value


def exit_code_of(error: KVKeepError) -> int:
    """The exit code that stands for a kind of error."""
    match error:
        case ConfigError() | RequestError():
            return EXIT_USAGE
        case UnsupportedModelError():
            return EXIT_UNSUPPORTED
        case CapacityError():
            return EXIT_CAPACITY
        case _:
            return EXIT_CHECK_FAILED


def stdout() -> Console:
    """Where a command's product goes."""
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """Where everything about the product goes: progress, receipts, errors."""
    return Console(file=sys.stderr, highlight=False)


def show_error(message: str) -> None:
    """One red line on stderr."""
    line = Text("error: ", style="bold red").append(" ".join(message.split()), style="red")
    stderr().print(line, soft_wrap=True)


def emit_json(value: object) -> None:
    """`value` as the one JSON object on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with `what` beside it while the block runs, where a person watches stderr.

    What it gives says something else from then on.
    """
    console = stderr()
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status(f"[dim]{what}[/dim]") as status:
        yield lambda text: status.update(f"[dim]{text}[/dim]")


def format_seconds(seconds: float) -> str:
    """Seconds for people, in three digits.

    >>> format_seconds(0.00512), format_seconds(0.25), format_seconds(12.34)
    ('5.12 ms', '250 ms', '12.3 s')
    """
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries below from writing to the terminal."""
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    loggers = [logging.getLogger(name) for name in _CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
