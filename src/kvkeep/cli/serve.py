"""`kvkeep serve`: a model over HTTP."""

import gc
import logging
import resource
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from kvkeep.cli.console import Command
from kvkeep.cli.loading import load_llm
from kvkeep.cli.options import (
    BUNDLED_MODEL,
    capacity_options,
    device_option,
    dtype_option,
    format_options,
    threads_option,
)
from kvkeep.cli.serve_options import server_flags, server_options, server_settings
from kvkeep.cli.tier_options import load_given, tier_options, tiers_of
from kvkeep.config.sources import LoadedSettings

if TYPE_CHECKING:
    from kvkeep.llm import LLM
    from kvkeep.tiers import TierSettings

__all__ = ["serve"]

_MOST_FILES = 65_536
# What tiers, models and logs have open beside the connections.
_OTHER_FILES = 512


@click.command(cls=Command)
@click.argument("model", default=BUNDLED_MODEL)
@dtype_option
@device_option
@threads_option
@capacity_options
@format_options
@tier_options
@server_options
def serve(**options: Any) -> None:
    """Serve MODEL over HTTP: a path, a hub id, or the bundled one.

    It speaks the protocols of OpenAI and Anthropic; docs/http.md describes all routes. The log on stderr has
    a line for every request, never what was in it. SIGTERM and Ctrl-C stop it in order: no new requests,
    those that run may finish, and the cache is written to the tiers that keep it.
    """
    context = click.get_current_context()
    loaded = load_given(context, server_flags(context))
    tiers = tiers_of(loaded)
    settings = server_settings(loaded, tiers)
    _log_to_stderr(settings.log_format)
    # Not before they are needed: --help and usage errors stay quick.
    from kvkeep.server.http_server import HttpServer
    from kvkeep.server.service import Service

    load = partial(_load_to_stay, options, loaded, tiers)
    service = Service(load, settings, model_id=options["model"])
    HttpServer(service, max_connections=_allow_files() - _OTHER_FILES).run()
    if service.failure is not None:
        raise service.failure


def _load_to_stay(
    options: dict[str, Any], loaded: LoadedSettings, tiers: "Sequence[TierSettings]"
) -> "LLM":
    """The model, set apart from garbage: a full collection, which every step waits for, passes it over."""
    llm = load_llm(options, loaded, tiers)
    gc.collect()
    gc.freeze()
    return llm


def _allow_files() -> int:
    """Raise the number of open files, of which every connection is one, as far as we may; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def _log_to_stderr(log_format: str) -> None:
    from kvkeep.server.log_lines import JsonLines, TextLines

    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(JsonLines() if log_format == "json" else TextLines())
    root = logging.getLogger()
    root.addHandler(output)
    root.setLevel(logging.WARNING)
    logging.getLogger("kvkeep").setLevel(logging.INFO)
