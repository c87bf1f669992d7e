"""`kvkeep config show`: the settings as flags, environment and file make them, and where each is from."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click

from kvkeep.cli.cache_tables import show_rows
from kvkeep.cli.console import Command, emit_json
from kvkeep.cli.options import capacity_options, format_options, json_option
from kvkeep.cli.serve_options import server_flags, server_options, server_settings
from kvkeep.cli.tier_options import load_given, tier_options, tiers_of
from kvkeep.config.server import SECRET_FIELDS, ServerSettings, server_kinds
from kvkeep.config.sources import LoadedSettings

__all__ = ["config"]

_HIDDEN = "***"


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command(cls=Command)
@click.option("--origins", is_flag=True, help="Say where every value comes from.")
@capacity_options
@format_options
@tier_options
@server_options
@json_option
@click.pass_context
def show(ctx: click.Context, /, *, origins: bool, as_json: bool, **options: Any) -> None:
    """Print the settings that a command with these options would run with, keys and passwords hidden.

    Flags rule over the environment (KVKEEP_...), that over the file that --config or KVKEEP_CONFIG names, and
    that over the defaults. Only `kvkeep serve` reads those of a server.
    """
    loaded = load_given(ctx, server_flags(ctx))
    # What a server refuses is refused here; nothing is opened or made for it.
    server_settings(loaded, tiers_of(loaded))
    values = _engine_values(loaded) | _server_values(loaded.server)
    values["warm"] = [str(table.options.get("name") or table.place) for table in loaded.warm]
    places = {name: str(loaded.name_to_origin[name]) for name in values}
    if as_json:
        tiers = [{"kind": one.kind, **one.shown_options} for one in loaded.tiers]
        shown: dict[str, object] = {"settings": values | {"tiers": tiers}}
        emit_json(shown | ({"origins": places} if origins else {}))
        return
    rows = [[name, _written(value), places[name]] for name, value in values.items()]
    columns = ["setting", "value", "from"]
    width = 3 if origins else 2
    show_rows(columns[:width], [row[:width] for row in rows], empty="no settings")


def _engine_values(loaded: LoadedSettings) -> dict[str, object]:
    names = [field.name for field in fields(loaded.engine)]
    values: dict[str, object] = {name: getattr(loaded.engine, name) for name in names}
    return values | {"tiers": loaded.tiers}


def _server_values(given: Mapping[str, object]) -> dict[str, object]:
    """All fields of a server, as texts, numbers and lists."""
    values: dict[str, object] = {}
    for field in fields(ServerSettings):
        value = given.get(field.name, field.default)
        if field.name in SECRET_FIELDS and value is not None:
            value = [_HIDDEN] * len(value) if isinstance(value, tuple) else _HIDDEN
        if isinstance(value, tuple):
            value = list(value)
        if field.name in server_kinds():
            is_plain = value is None or isinstance(value, int | float | list)
            values[field.name] = value if is_plain else str(value)
    return values


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        # As text a tier is without its passwords.
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else repr(value)
