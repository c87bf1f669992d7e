"""`kvkeep demo`: what the cache does, on a model that comes with the package, checked as it goes."""

from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvkeep.cli.console import (
    EXIT_CHECK_FAILED,
    Command,
    emit_json,
    format_seconds,
    stdout,
    working,
)
from kvkeep.cli.options import json_option, model_option, num_threads_for, threads_option

if TYPE_CHECKING:
    from kvkeep.cli.demo_scenes import Scene
    from kvkeep.planning import Coverage

__all__ = ["demo"]

# Equality of greedy tokens is promised in this precision.
_DTYPE = "float32"
_BAR_CELLS = 50


@click.command(cls=Command)
@model_option
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=24,
    show_default=True,
    help="Most tokens of an answer.",
)
@threads_option
@json_option
@click.pass_context
def demo(
    ctx: click.Context, *, model: str, tokens: int, threads: int | None, as_json: bool
) -> None:
    """Show what the cache does, and check every output.

    A long prompt twice, many requests under one system prompt, a conversation, and a cache with holes;
    offline, in float32. Each output is computed again by plain transformers on the same model, and the
    tokens must be equal; otherwise the exit code is 1.
    """
    started_s = perf_counter()
    scenes = _play(model, tokens, num_threads_for(model, threads))
    took_s = perf_counter() - started_s
    passed = all(scene.passed for scene in scenes)
    if as_json:
        emit_json(
            {
                "model": model,
                "dtype": _DTYPE,
                "passed": passed,
                "took_s": took_s,
                "scenes": [_as_json(scene) for scene in scenes],
            }
        )
    else:
        _show(stdout(), scenes, took_s)
    if not passed:
        ctx.exit(EXIT_CHECK_FAILED)


def _play(model: str, max_tokens: int, num_threads: int | None) -> "list[Scene]":
    with working(f"asking {model}, then plain transformers"):
        from kvkeep.cli.demo_scenes import play  # slow: loads torch

        return list(play(model, _DTYPE, max_tokens, num_threads))


def _as_json(scene: "Scene") -> dict[str, Any]:
    return asdict(scene) | {"gaps_equal": scene.gaps_equal, "passed": scene.passed}


def _show(console: Console, scenes: "Sequence[Scene]", took_s: float) -> None:
    console.print(_table(scenes))
    for scene in scenes:
        if scene.before and scene.after:
            _show_coverage(console, scene.before, scene.after, scene)
    console.print(
        "\n[dim]computed, reused: tokens of the prompts. first token: of the last request. plain: the same "
        "outputs by transformers' generate() with its own cache, one after another, on the same model "
        "and threads; tokens are equal when all of these are.[/dim]"
    )
    console.print(f"\n{_summary(scenes)} [dim]({took_s:.0f} s in all)[/dim]")


def _table(scenes: "Sequence[Scene]") -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 1, 0))
    table.add_column("what happens", ratio=1)
    for heading in ("computed", "reused", "first\ntoken", "time", "plain", "tokens\nequal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for scene in scenes:
        story = Text(scene.story)
        if scene.answer:
            story.append(f"\n{scene.asked} ", style="dim")
            story.append(scene.answer.splitlines()[0], style="cyan")
        table.add_row(
            story,
            f"{scene.computed_tokens:,}",
            f"{scene.reused_tokens:,}",
            format_seconds(scene.first_token_s),
            format_seconds(scene.total_s),
            format_seconds(scene.plain_s),
            _yes_or_no(correct=scene.tokens_equal),
        )
    return table


def _show_coverage(console: Console, before: "Coverage", after: "Coverage", scene: "Scene") -> None:
    """What was known of the prompt, as bars, and whether just the gaps were computed."""
    num_gap_tokens = after.num_tokens - after.known_tokens
    console.print("\nWhat the cache knew of the long prompt, and what it had lost:")
    for label, coverage in (("before", before), ("after", after)):
        share = f" {coverage.known_tokens:,} of {coverage.num_tokens:,}"
        console.print(Text(f"{label:7}").append(_bar(coverage)).append(share, style="dim"))
    gaps = ", ".join(f"{gap.start} to {gap.stop - 1}" for gap in after.gaps)
    console.print(
        f"Gaps: positions {gaps}: {num_gap_tokens} tokens; computed: {scene.computed_tokens}. Equal: ",
        _yes_or_no(correct=scene.gaps_equal),
        sep="",
    )


def _bar(coverage: "Coverage") -> Text:
    bar = Text()
    for cell in range(_BAR_CELLS):
        start = cell * coverage.num_tokens // _BAR_CELLS
        stop = (cell + 1) * coverage.num_tokens // _BAR_CELLS
        has_gap = any(gap.start < stop and gap.stop > start for gap in coverage.gaps)
        bar.append("░" if has_gap else "█", style="red" if has_gap else "green")
    return bar


def _yes_or_no(*, correct: bool) -> Text:
    return Text("yes", style="green") if correct else Text("no", style="bold red")


def _summary(scenes: "Sequence[Scene]") -> str:
    failed = [scene.name for scene in scenes if not scene.passed]
    if failed:
        return f"[bold red]Not every check holds: {', '.join(failed)}.[/bold red]"
    name_to_scene = {scene.name: scene for scene in scenes}
    sooner = name_to_scene["cold"].first_token_s / name_to_scene["warm"].first_token_s
    reused = sum(scene.reused_tokens for scene in scenes)
    prompts = reused + sum(scene.computed_tokens for scene in scenes)
    return (
        f"[bold]The long prompt was answered {sooner:.0f} times sooner when warm. Of {prompts:,} prompt "
        f"tokens {reused / prompts:.0%} were not computed again, and every output is the one of plain "
        "transformers.[/bold]"
    )
