"""`kvkeep cache ls|show|stats|lookup|watch`: questions, to a server or about a folder of blocks."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from kvkeep.cli.cache_folder import folder_groups, folder_show, folder_state
from kvkeep.cli.cache_tables import show_groups, show_kind, show_known, show_state
from kvkeep.cli.client import (
    ServerCommand,
    client_of,
    path_of,
    read_json_file,
    server_options,
)
from kvkeep.cli.console import emit_json, stdout
from kvkeep.cli.options import json_option
from kvkeep.config.warm import prompt_fields

__all__ = ["folder_option", "look_commands"]

folder_option = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Look into a folder of blocks, without a server.",
)
salt_option = click.option("--salt", help="Those of one tenant.")


@click.command(cls=ServerCommand)
@click.option("--sessions", "kind", flag_value="sessions", help="Sessions in place of blocks.")
@click.option("--contexts", "kind", flag_value="contexts", help="Named contexts.")
@click.option("--pins", "kind", flag_value="pins", help="Pins.")
@click.option("--blocks", "kind", flag_value="blocks", help="Every block by itself.")
@click.option("--session", help="Blocks that a session uses.")
@click.option("--tag", help="Blocks with a tag.")
@click.option("--tier", help='Blocks in a tier, "device" is one.')
@click.option(
    "--sort",
    type=click.Choice(["last_used", "bytes", "created"]),
    default="last_used",
    show_default=True,
    help="Order of --blocks.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Most rows."
)
@salt_option
@folder_option
@server_options
@json_option
def ls(*, kind: str | None, folder: Path | None, as_json: bool, limit: int, **options: Any) -> None:
    """List what is cached.

    Blocks that bear the same labels are one row.
    """
    if folder is not None:
        _refuse_kinds(kind)
        rows = folder_groups(folder, session=options["session"], tag=options["tag"])[:limit]
        kind = None
    else:
        rows = _listed(kind, limit, options)
    if as_json:
        emit_json({"object": "list", "data": rows})
    elif kind is None:
        show_groups(rows)
    else:
        show_kind(kind, rows)


def _refuse_kinds(kind: str | None) -> None:
    if kind is not None:
        raise click.UsageError(f"--{kind} needs a server; leave --folder out")


def _listed(kind: str | None, limit: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    client = client_of(options)
    if kind in ("sessions", "contexts"):
        return list(client.get(path_of("v1", "cache", kind), salt=options["salt"])["data"])[:limit]
    if kind == "pins":
        return list(client.get("/v1/cache/pins")["data"])[:limit]
    chosen = {name: options[name] for name in ("session", "tag", "tier", "salt")}
    by = "labels" if kind is None else "block"
    return client.pages("/v1/cache/entries", limit, by=by, sort=options["sort"], **chosen)


@click.command(cls=ServerCommand)
@click.argument("name")
@click.option("--session", "kind", flag_value="sessions", help="NAME is a session.")
@click.option("--context", "kind", flag_value="contexts", help="NAME is a context.")
@click.option("--text", is_flag=True, help="Of a block also its text, where the server knows it.")
@salt_option
@folder_option
@server_options
@json_option
def show(
    *, name: str, kind: str | None, folder: Path | None, as_json: bool, **options: Any
) -> None:
    """Show all that is known of one thing.

    NAME is the key of a block in hex, a session or a context.
    """
    if options["text"] and (folder is not None or kind is not None):
        raise click.UsageError("--text is of a block of a server; leave --folder and its kind out")
    if folder is not None:
        _refuse_kinds(kind)
        found = folder_show(folder, name)
    else:
        asked = {"salt": options["salt"]}
        if options["text"]:
            asked["include"] = "text"
        found = client_of(options).get(path_of("v1", "cache", kind or "entries", name), **asked)
    if as_json:
        emit_json(found)
        return
    for field, value in found.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        stdout().print(Text(f"{field}: {shown}"), soft_wrap=True)


@click.command(cls=ServerCommand)
@folder_option
@server_options
@json_option
def stats(*, folder: Path | None, as_json: bool, **options: Any) -> None:
    """Show the content of the device and of every tier."""
    state = folder_state(folder) if folder is not None else client_of(options).get("/v1/cache")
    if as_json:
        emit_json(state)
    else:
        show_state(state)


@click.command(cls=ServerCommand)
@click.argument("file", required=False)
@click.option("--prompt", help="Plain text, in place of FILE.")
@click.option("--session", help="Compare with the last prompt of this session.")
@salt_option
@server_options
@json_option
def lookup(*, file: str | None, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Say what a request would find, and why not more.

    Nothing is computed. FILE is JSON as for chat or completions; "-" is stdin.
    """
    if (file is None) == (prompt is None):
        raise click.UsageError("give FILE or --prompt")
    body = {"prompt": prompt} if file is None else prompt_fields(read_json_file(file))
    given = {name: options[name] for name in ("session", "salt") if options[name] is not None}
    known = client_of(options).post("/v1/cache/lookup", {**body, **given})
    if as_json:
        emit_json(known)
    else:
        show_known(known)


@click.command(cls=ServerCommand)
@click.option("--num", type=click.IntRange(min=1), help="End after so many events.")
@server_options
@json_option
def watch(*, num: int | None, as_json: bool, **options: Any) -> None:
    """Print what happens to the cache as it does.

    A line for every event, with --json an object, until interrupted.
    """
    for number, one in enumerate(client_of(options).events("/v1/cache/events"), 1):
        if as_json:
            click.echo(_compact(one))
        else:
            at = datetime.fromtimestamp(one.pop("at", 0.0), UTC).astimezone()
            rest = " ".join(f"{name}={value}" for name, value in one.items() if name != "type")
            stdout().print(Text(f"{at:%H:%M:%S} {one['type']:<11} {rest}"), soft_wrap=True)
        if number == num:
            return


def _compact(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


look_commands = (ls, show, stats, lookup, watch)
