"""Options that say where blocks are kept below the device, and where settings come from."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from kvkeep.config.sources import LoadedSettings, load_settings
from kvkeep.errors import ConfigError
from kvkeep.tiers.floors import tier_names, tier_settings
from kvkeep.tiers.settings import TierSettings

__all__ = ["is_given", "load_given", "tier_options", "tiers_of"]

_Command = Callable[..., Any]
# Options of commands that are fields of EngineSettings under the same name.
ENGINE_OPTIONS = ("capacity", "block_size", "kv_format", "kv_exact_first_block", "kernels")


def tier_options(function: _Command) -> _Command:
    """--tier, once for each tier, and --config."""
    add_tiers = click.option(
        "--tier",
        "tiers",
        multiple=True,
        metavar="TIER",
        help="Keep blocks below the device too: host:4GB, disk:FOLDER:50GB, redis://HOST, "
        "s3://BUCKET/PREFIX; repeatable, nearest first, options behind '?'.",
    )
    add_config = click.option(
        "--config",
        metavar="FILE",
        help="Settings from a TOML file, where neither a flag nor the environment gives them.  "
        "[default: what KVKEEP_CONFIG names]",
    )
    return add_tiers(add_config(function))


def load_given(
    context: click.Context, server_flags: Mapping[str, object] | None = None
) -> LoadedSettings:
    """Settings from the options that were given, the environment, the file, and defaults, in this order.

    An option's own default does not count: it must not overrule what a file says. `server_flags` are what
    kvkeep.cli.serve_options.server_flags finds.
    """
    options = context.params
    names = [one for one in (*ENGINE_OPTIONS, "tiers") if one in options and is_given(context, one)]
    name_to_flag = {str(one.name): max(one.opts, key=len) for one in context.command.params}
    if options.get("api_keys_file") is not None:
        only_file = not options["api_keys"]
        name_to_flag["api_keys"] = "--api-keys-file" if only_file else "--api-key, --api-keys-file"
    return load_settings(
        file=options.get("config"),
        flags={name: options[name] for name in names} | dict(server_flags or {}),
        name_to_flag=name_to_flag,
    )


def is_given(context: click.Context, name: str) -> bool:
    """Whether an option was typed."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def tiers_of(settings: LoadedSettings) -> Sequence[TierSettings]:
    """The tiers that the settings ask for, nearest first; none is opened."""
    try:
        found = tuple(tier_settings(table) for table in settings.tiers)
        tier_names(found)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {settings.name_to_origin['tiers']})") from error
    return found
