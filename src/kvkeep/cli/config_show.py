"""`kvkeep config show`: the settings as flags, environment and file make them, and where each is from."""

from dataclasses import fields
from typing import Any

import click

from kvkeep.cli.cache_tables import show_rows
from kvkeep.cli.console import Command, emit_json
from kvkeep.cli.options import capacity_options, format_options, json_option
from kvkeep.cli.tier_options import load_given, tier_options

__all__ = ["config"]


@click.group()
def config() -> None:
    """Look at the settings."""


@config.command(cls=Command)
@click.option("--origins", is_flag=True, help="Say where every value comes from.")
@capacity_options
@format_options
@tier_options
@json_option
@click.pass_context
def show(ctx: click.Context, /, *, origins: bool, as_json: bool, **options: Any) -> None:
    """Print the settings that a command with these options would run with.

    Flags rule over the environment (KVKEEP_...), that over the file that --config or KVKEEP_CONFIG names, and
    that over the defaults.
    """
    loaded = load_given(ctx)
    names = [field.name for field in fields(loaded.engine)]
    values: dict[str, object] = {name: getattr(loaded.engine, name) for name in names}
    # As text a table is without its passwords.
    values["tiers"] = [repr(table) for table in loaded.tiers]
    places = {name: str(loaded.name_to_origin[name]) for name in values}
    if as_json:
        shown: dict[str, object] = {"settings": values}
        emit_json(shown | ({"origins": places} if origins else {}))
        return
    rows = [[name, _written(value), places[name]] for name, value in values.items()]
    columns = ["setting", "value", "from"]
    width = 3 if origins else 2
    show_rows(columns[:width], [row[:width] for row in rows], empty="no settings")


def _written(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value if isinstance(value, str) else repr(value)
