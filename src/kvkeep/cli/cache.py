"""`kvkeep cache`: what is cached, by a server or in a folder of blocks, without a model."""

from dataclasses import asdict
from pathlib import Path

import click

from kvkeep.cli.cache_change import change_commands
from kvkeep.cli.cache_folder import opened_folder
from kvkeep.cli.cache_lint import lint
from kvkeep.cli.cache_look import look_commands
from kvkeep.cli.console import EXIT_CHECK_FAILED, Command, emit_json, stdout, working
from kvkeep.cli.options import json_option
from kvkeep.config.sizes import format_bytes

__all__ = ["cache"]


@click.group()
def cache() -> None:
    """Look after what is cached: by a running server, or in a folder on disk."""


@cache.command(cls=Command)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--repair", is_flag=True, help="Put wrong blocks aside, in FOLDER/quarantine.")
@json_option
@click.pass_context
def verify(ctx: click.Context, /, *, folder: Path, repair: bool, as_json: bool) -> None:
    """Read every block in FOLDER and compare it with its checksum, its name and its tokens.

    The exit code is 1 when blocks are wrong and were left where they are. Serving never uses a wrong block,
    verified or not: this is to know the state of a disk.
    """
    from kvkeep.tiers.audit import audit

    with working(f"reading {folder}"), opened_folder(folder) as tier:
        report = audit(tier, repair=repair)
    if as_json:
        wrong = [{"key": one.key.hex(), "reason": one.reason} for one in report.wrong]
        emit_json({**asdict(report), "wrong": wrong, "repaired": repair})
    else:
        out = stdout()
        out.print(f"{report.num_objects} blocks, {format_bytes(report.num_bytes)} read")
        for one in report.wrong:
            out.print(f"{one.key.hex()}: {one.reason}", soft_wrap=True)
        verdict = "put aside" if repair else "left where they are; --repair puts them aside"
        out.print(f"{len(report.wrong)} wrong, {verdict}" if report.wrong else "all are right")
    if report.wrong and not repair:
        ctx.exit(EXIT_CHECK_FAILED)


for _command in (*look_commands, lint, *change_commands):
    cache.add_command(_command)
