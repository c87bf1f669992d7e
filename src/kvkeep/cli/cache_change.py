"""`kvkeep cache warm|pin|unpin|rm|clear|export|import`: orders, to a server or about a folder of blocks."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from kvkeep.cli.cache_folder import Chosen, check_key_start, folder_purge
from kvkeep.cli.cache_look import folder_option, refuse_with_folder
from kvkeep.cli.cache_tables import show_purge
from kvkeep.cli.client import (
    RefusedError,
    ServerClient,
    ServerCommand,
    client_of,
    path_of,
    read_json_file,
    server_options,
)
from kvkeep.cli.console import (
    EXIT_CHECK_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    emit_json,
    format_seconds,
    show_error,
    stdout,
    working,
)
from kvkeep.cli.options import json_option
from kvkeep.config.sizes import format_bytes
from kvkeep.config.warm import WarmPrompt, check_kept, prompt_fields, read_prompts

__all__ = ["change_commands"]

# What a context has beyond its prompt.
_ONLY_KEPT = ("ttl", "tags", "pin")
# What the names of contexts' pins begin with.
_OF_CONTEXT = "context:"
_NOT_FOUND = 404
salt_option = click.option("--salt", help="As the requests of one tenant.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done, and do nothing."
)
pinned_option = click.option("--include-pinned", is_flag=True, help="Pinned blocks too.")


@click.command(cls=ServerCommand)
@click.argument("file")
@click.option("--name", help="Of the context; a catalogue has its own.  [default: FILE's name]")
@click.option("--ttl", help='How long to keep it: "30m", "7d", "never".')
@click.option("--tag", "tags", multiple=True, help="What it depends on; repeatable.")
@click.option("--pin", is_flag=True, help="Keep it until it is unpinned.")
@salt_option
@dry_run_option
@server_options
@json_option
@click.pass_context
def warm(ctx: click.Context, /, *, file: str, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Compute the prompts of FILE ahead and keep them.

    Each is a context with a name. FILE is text, a request in JSON, or a catalogue: JSON lines with a name and
    messages, prompt or token_ids each, and their own ttl, tags and pin if need be. --dry-run looks up what is
    known of each.
    """
    client, rows, num_failed = client_of(options), [], 0
    prompts = _prompts(file, options)
    with working(f"0 of {len(prompts)}") as say:
        for number, one in enumerate(prompts, 1):
            try:
                rows.append(_warm_one(client, one, dry_run=dry_run))
            except RefusedError as error:
                num_failed += 1
                show_error(f"{one.place or file}: {one.name}: {error}")
            say(f"{number} of {len(prompts)}: {one.name}")
    if as_json:
        emit_json({"object": "list", "data": rows, "failed": num_failed, "dry_run": dry_run})
    else:
        for row in rows:
            stdout().print(_warm_line(row), soft_wrap=True)
    if num_failed:
        ctx.exit(EXIT_CHECK_FAILED)


def _prompts(file: str, options: dict[str, Any]) -> list[WarmPrompt]:
    kept = {name: options[name] for name in ("ttl", "tags", "pin", "salt") if options[name]}
    if file != "-":
        return list(read_prompts(Path(file), name=options["name"], kept=kept))
    name, text = options["name"] or file, sys.stdin.read()
    if not text.strip():
        raise click.UsageError("stdin is empty; write a prompt into it")
    check_kept(kept)
    return [WarmPrompt(name=name, fields={"prompt": text, **kept})]


def _warm_one(client: ServerClient, one: WarmPrompt, *, dry_run: bool) -> dict[str, Any]:
    if not dry_run:
        return client.post("/v1/cache/contexts", {"name": one.name, **one.fields})
    asked = {name: value for name, value in one.fields.items() if name not in _ONLY_KEPT}
    return {"name": one.name, **client.post("/v1/cache/lookup", asked)}


def _warm_line(row: dict[str, Any]) -> str:
    if "receipt" not in row:
        return (
            f"{row['name']}: {row['missing_tokens']:,} of {row['total_tokens']:,} tokens to compute"
        )
    receipt = row["receipt"]
    return (
        f"{row['name']}: {receipt['computed_tokens']:,} tokens computed, {receipt['reused_tokens']:,} "
        f"reused, {format_seconds(receipt['total_ms'] / 1e3)}"
    )


@click.command(cls=ServerCommand)
@click.argument("name")
@click.option("--session", help="What this session sent last.")
@click.option("--context", help="A named context.  [default: the context NAME]")
@click.option("--file", help="The prompt of a request in JSON.")
@salt_option
@server_options
@json_option
def pin(*, name: str, file: str | None, as_json: bool, **options: Any) -> None:
    """Keep what is cached until it is unpinned.

    NAME is the pin's; what it keeps is a context, what a session sent last, or a prompt.
    """
    body: dict[str, Any] = {"name": name}
    targets = {"session": options["session"], "context": options["context"]}
    body |= {what: value for what, value in targets.items() if value is not None}
    if file is not None:
        body |= prompt_fields(read_json_file(file))
    if len(body) == 1:
        body["context"] = name
    if options["salt"] is not None:
        body["salt"] = options["salt"]
    found = client_of(options).post("/v1/cache/pins", body)
    if as_json:
        emit_json(found)
    else:
        stdout().print(f"{found['name']}: {found['blocks']:,} blocks pinned")


@click.command(cls=ServerCommand)
@click.argument("name")
@server_options
@json_option
def unpin(*, name: str, as_json: bool, **options: Any) -> None:
    """End a pin.

    NAME is the pin's; that of a context is "context:" and the name of the context.
    """
    try:
        found = client_of(options).delete(path_of("v1", "cache", "pins", name))
    except RefusedError as error:
        if error.status != _NOT_FOUND or name.startswith(_OF_CONTEXT):
            raise
        hint = f"the pin of a context {name} is {_OF_CONTEXT}{name}"
        raise RefusedError(error.status, f"{error}; {hint}") from error
    if as_json:
        emit_json(found)
    else:
        stdout().print(f"{found['name']}: {found['affected']:,} blocks are pinned by it no more")


@click.command(cls=ServerCommand)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--session", "sessions", multiple=True, help="Close a session; repeatable.")
@click.option("--context", "contexts", multiple=True, help="Forget a named context; repeatable.")
@click.option("--tag", "tags", multiple=True, help="Blocks with a tag; repeatable.")
@click.option("--file", help="The blocks of the prompt of a request in JSON.")
@click.option("--older-than", help='Blocks computed so long ago: "7d".')
@click.option("--unused-for", help='Blocks not used for so long: "12h".')
@click.option("--tier", "tiers", multiple=True, help='Only there: "device" or a tier; repeatable.')
@pinned_option
@salt_option
@folder_option
@dry_run_option
@server_options
@json_option
@click.pass_context
def rm(ctx: click.Context, /, *, folder: Path | None, as_json: bool, **options: Any) -> None:
    """Forget blocks, wherever they lie.

    They are chosen by KEY, session, context, tag, prompt or age; each choice has a receipt of its own.
    """
    if folder is not None:
        refuse_with_folder(ctx, "contexts", "file", "salt", "tiers", "tenant")
        receipts = [folder_purge(folder, _chosen(options), dry_run=options["dry_run"])]
    else:
        receipts = list(_removed(client_of(options), options))
    if not receipts:
        raise click.UsageError(
            "nothing is chosen; give KEY, --session, --context, --tag, --file or an age"
        )
    if as_json:
        emit_json({"object": "list", "data": receipts})
    else:
        for receipt in receipts:
            show_purge(receipt)


def _chosen(options: dict[str, Any]) -> Chosen:
    return Chosen(
        keys=tuple(options["keys"]),
        sessions=tuple(options["sessions"]),
        tags=tuple(options["tags"]),
        older_than=options["older_than"],
        unused_for=options["unused_for"],
        include_pinned=options["include_pinned"],
    )


def _removed(client: ServerClient, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One receipt for each thing that is to go."""
    dry_run, salt = options["dry_run"], options["salt"]
    for key in options["keys"]:
        check_key_start(key)
    for key in options["keys"]:
        path = path_of("v1", "cache", "entries", key)
        yield client.delete(path, dry_run=dry_run, include_pinned=options["include_pinned"])
    for kind in ("sessions", "contexts"):
        for name in options[kind]:
            yield client.delete(path_of("v1", "cache", kind, name), dry_run=dry_run, salt=salt)
    body: dict[str, Any] = {}
    if options["tags"]:
        body["tags"] = list(options["tags"])
    for name in ("older_than", "unused_for"):
        if options[name] is not None:
            body[name] = options[name]
    if options["file"] is not None:
        body["prefix"] = prompt_fields(read_json_file(options["file"]))
        body["prefix"] |= {} if salt is None else {"salt": salt}
    if body:
        yield client.post("/v1/cache/purge", body | _common(options))


def _common(options: dict[str, Any]) -> dict[str, Any]:
    body = {"dry_run": options["dry_run"], "include_pinned": options["include_pinned"]}
    if options["tiers"]:
        body["tiers"] = list(options["tiers"])
    if options["salt"] is not None:
        body["salt"] = options["salt"]
    return body


@click.command(cls=ServerCommand)
@click.option("--tier", "tiers", multiple=True, help='Only there: "device" or a tier; repeatable.')
@pinned_option
@salt_option
@folder_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@dry_run_option
@server_options
@json_option
@click.pass_context
def clear(
    ctx: click.Context, /, *, folder: Path | None, yes: bool, as_json: bool, **options: Any
) -> None:
    """Forget everything.

    After a look at what that is, and a question, which --yes leaves out.
    """
    if folder is not None:
        refuse_with_folder(ctx, "salt", "tiers", "tenant")
    what = str(folder) if folder is not None else options["url"]
    is_asked = not (yes or options["dry_run"])
    if is_asked:
        would = _cleared(folder, options, dry_run=True)
        question = (
            f"{what}: {would['deleted']:,} blocks, {format_bytes(would['freed_bytes'])} would be "
            "forgotten. Go on?"
        )
        _confirm(question)
    receipt = _cleared(folder, options, dry_run=options["dry_run"])
    if as_json:
        emit_json(receipt)
    else:
        show_purge(receipt)


def _confirm(question: str) -> None:
    """End the command unless the answer is yes."""
    context = click.get_current_context()
    try:
        if click.confirm(question, err=True):
            return
    except click.Abort as error:
        click.echo("\nnothing was removed; --yes asks no question", err=True)
        # The end of stdin is no Ctrl-C: nobody is there to answer.
        is_silent = isinstance(error.__context__, EOFError)
        context.exit(EXIT_USAGE if is_silent else EXIT_INTERRUPTED)
    click.echo("nothing was removed", err=True)
    context.exit(EXIT_CHECK_FAILED)


def _cleared(folder: Path | None, options: dict[str, Any], *, dry_run: bool) -> dict[str, Any]:
    if folder is not None:
        chosen = Chosen(everything=True, include_pinned=options["include_pinned"])
        return folder_purge(folder, chosen, dry_run=dry_run)
    body = {"all": True, **_common(options | {"dry_run": dry_run})}
    return client_of(options).post("/v1/cache/purge", body)


@click.command(cls=ServerCommand)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--session", required=True, help="Whose last request is written to FILE.")
@salt_option
@server_options
@json_option
def export(*, file: Path, session: str, as_json: bool, **options: Any) -> None:
    """Write the blocks of a session to FILE.

    `kvkeep cache import` enters them elsewhere.
    """
    path = path_of("v1", "cache", "sessions", session) + "/export"
    with working(f"exporting {session}"):
        num_bytes = client_of(options).download(path, file, salt=options["salt"])
    if as_json:
        emit_json({"file": str(file), "bytes": num_bytes})
    else:
        stdout().print(f"{file}: {format_bytes(num_bytes)}", soft_wrap=True)


@click.command("import", cls=ServerCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@salt_option
@server_options
@json_option
def import_(*, file: Path, as_json: bool, **options: Any) -> None:
    """Enter the blocks of an exported FILE.

    The server must have the model that computed them.
    """
    with working(f"importing {file}"):
        found = client_of(options).upload("/v1/cache/import", file, salt=options["salt"])
    if as_json:
        emit_json(found)
    else:
        stdout().print(
            f"{found['added']:,} blocks added, {found['present']:,} were there, {found['no_room']:,} "
            "found no room"
        )


change_commands = (warm, pin, unpin, rm, clear, export, import_)
