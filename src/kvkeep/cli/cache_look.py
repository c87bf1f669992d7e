"""`kvkeep cache ls|show|stats|lookup|watch`: questions, to a server or about a folder of blocks."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from kvkeep.cli.cache_folder import (
    check_key_start,
    folder_blocks,
    folder_groups,
    folder_show,
    folder_state,
)
from kvkeep.cli.cache_tables import show_groups, show_kind, show_known, show_state
from kvkeep.cli.client import (
    Rows,
    ServerClient,
    ServerCommand,
    client_of,
    path_of,
    read_json_file,
    server_options,
)
from kvkeep.cli.console import emit_json, stderr, stdout
from kvkeep.cli.options import json_option
from kvkeep.cli.tier_options import is_given
from kvkeep.config.nearest import nearest_hint
from kvkeep.config.warm import prompt_fields

__all__ = ["folder_option", "look_commands", "refuse_with_folder"]

_BLOCKS = "blocks"
_KINDS = ("sessions", "contexts", "pins", _BLOCKS)
# What may narrow or order a list, by what is listed; None is blocks together by their labels.
_CHOICES = ("session", "tag", "tier", "salt", "sort")
_KIND_TO_CHOICES: dict[str | None, tuple[str, ...]] = {
    None: _CHOICES[:-1],
    _BLOCKS: _CHOICES,
    "sessions": ("salt",),
    "contexts": ("salt",),
    "pins": (),
}

folder_option = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Look into a folder of blocks, without a server.",
)
salt_option = click.option("--salt", help="Those of one tenant.")


@click.command(cls=ServerCommand)
@click.option("--sessions", is_flag=True, help="Sessions in place of blocks.")
@click.option("--contexts", is_flag=True, help="Named contexts.")
@click.option("--pins", is_flag=True, help="Pins.")
@click.option("--blocks", is_flag=True, help="Every block by itself.")
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
@click.pass_context
def ls(
    ctx: click.Context, /, *, folder: Path | None, as_json: bool, limit: int, **options: Any
) -> None:
    """List what is cached.

    Blocks that bear the same labels are one row.
    """
    if folder is not None:
        refuse_with_folder(ctx, "sessions", "contexts", "pins", "tier", "salt", "sort", "tenant")
    kind = _only_kind(options, _KINDS)
    _check_choices(ctx, kind)
    if folder is None:
        rows = _listed(kind, limit, options)
    else:
        list_folder = folder_groups if kind is None else folder_blocks
        found = list_folder(folder, session=options["session"], tag=options["tag"])
        rows = Rows.first(found, limit)
    if as_json:
        emit_json({"object": "list", "data": rows.data, "has_more": rows.has_more})
        return
    if kind is None:
        show_groups(rows.data)
    else:
        show_kind(kind, rows.data)
    if rows.has_more:
        of_all = "" if rows.num_all is None else f" of {rows.num_all:,}"
        stderr().print(f"first {len(rows.data):,}{of_all} rows; --limit shows more", soft_wrap=True)


def refuse_with_folder(context: click.Context, *names: str) -> None:
    """Raise UsageError where an option was given that only a server understands."""
    for option in context.command.params:
        if option.name in names and is_given(context, option.name):
            raise click.UsageError(f"{option.opts[0]} needs a server; leave --folder out")


def _only_kind(options: dict[str, Any], kinds: Sequence[str]) -> str | None:
    given = [kind for kind in kinds if options[kind]]
    if len(given) > 1:
        flags = " and ".join(f"--{kind}" for kind in given)
        raise click.UsageError(f"{flags} exclude one another; give one")
    return given[0] if given else None


def _check_choices(context: click.Context, kind: str | None) -> None:
    for name in _CHOICES:
        if name not in _KIND_TO_CHOICES[kind] and is_given(context, name):
            if kind is None:
                raise click.UsageError(f"--{name} is for --{_BLOCKS}; give both, or neither")
            raise click.UsageError(f"--{name} means nothing to --{kind}; leave it out")


def _listed(kind: str | None, limit: int, options: dict[str, Any]) -> Rows:
    client = client_of(options)
    if kind in ("sessions", "contexts"):
        return client.rows(path_of("v1", "cache", kind), limit, salt=options["salt"])
    if kind == "pins":
        return client.rows("/v1/cache/pins", limit)
    chosen = {name: options[name] for name in ("session", "tag", "tier", "salt")}
    by = "labels" if kind is None else "block"
    rows = client.pages("/v1/cache/entries", limit, by=by, sort=options["sort"], **chosen)
    if not rows.data and options["tier"] is not None:
        _check_tier(client, options["tier"])
    return rows


def _check_tier(client: ServerClient, tier: str) -> None:
    known = client.get("/v1/cache")["tiers"]
    if tier not in known:
        raise click.UsageError(f"--tier={tier!r} is no tier there; {nearest_hint(tier, known)}")


@click.command(cls=ServerCommand)
@click.argument("name")
@click.option("--session", is_flag=True, help="NAME is a session.")
@click.option("--context", is_flag=True, help="NAME is a context.")
@click.option("--text", is_flag=True, help="Of a block also its text, where the server knows it.")
@salt_option
@folder_option
@server_options
@json_option
@click.pass_context
def show(
    ctx: click.Context, /, *, name: str, folder: Path | None, as_json: bool, **options: Any
) -> None:
    """Show all that is known of one thing.

    NAME is the key of a block in hex, a session or a context.
    """
    kind = _only_kind(options, ("session", "context"))
    if options["text"] and kind is not None:
        raise click.UsageError(f"--text is of a block; leave it or --{kind} out")
    if folder is not None:
        refuse_with_folder(ctx, "session", "context", "text", "salt", "tenant")
        found = folder_show(folder, name)
    else:
        found = _shown(name, kind, options)
    if as_json:
        emit_json(found)
        return
    for field, value in found.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        stdout().print(Text(f"{field}: {shown}"), soft_wrap=True)


def _shown(name: str, kind: str | None, options: dict[str, Any]) -> dict[str, Any]:
    client, asked = client_of(options), {"salt": options["salt"]}
    if kind is not None:
        return client.get(path_of("v1", "cache", f"{kind}s", name), **asked)
    if options["text"]:
        asked["include"] = "text"
    check_key_start(name, remedy="or --session or --context for one of that name")
    return client.get(path_of("v1", "cache", "entries", name), **asked)


@click.command(cls=ServerCommand)
@folder_option
@server_options
@json_option
@click.pass_context
def stats(ctx: click.Context, /, *, folder: Path | None, as_json: bool, **options: Any) -> None:
    """Show the content of the device and of every tier."""
    if folder is not None:
        refuse_with_folder(ctx, "tenant")
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
