"""`kvkeep bench`: what can be measured without running a model."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from kvkeep.cli.console import Command, emit_json, stderr, stdout, working
from kvkeep.cli.doctor_tables import new_table, show_whole_table
from kvkeep.cli.options import default_of, json_option
from kvkeep.config import EngineSettings
from kvkeep.config.sizes import format_bytes

if TYPE_CHECKING:
    from kvkeep.replay import ReplayReport, ReplaySettings, TraceRequest

__all__ = ["bench"]

# The names of kvkeep.replay.WORKLOADS, which are not loaded for --help.
_WORKLOADS = ("chat", "agent", "document")
# A model of 32 layers with 8 key heads of 128 in two bytes, as Llama 3 8B.
_BYTES_PER_TOKEN = 131_072


@click.group()
def bench() -> None:
    """Measure what needs no model."""


@bench.command(cls=Command)
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--generate",
    "workload",
    type=click.Choice(_WORKLOADS),
    help="Make a trace up, in place of FILE.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=10_000,
    show_default=True,
    help="Requests of a trace that is made up.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of a trace that is made up.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the trace that is made up to this file, and replay nothing.",
)
@click.option(
    "--capacities",
    default="100GB,1TB",
    show_default=True,
    help="Sizes of the device, one after the other.",
)
@click.option(
    "--policies",
    default=default_of(EngineSettings, "policy"),
    show_default=True,
    help="Eviction policies of the device: lru, slru, gdsf, s3fifo.",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    help='A tier below, nearest first: "host:1TB", "disk:4TB?policy=slru&write_on=reused,evicted"; '
    "repeatable.",
)
@click.option(
    "--bytes-per-token",
    type=click.IntRange(min=1),
    default=_BYTES_PER_TOKEN,
    show_default=True,
    help="K/V of one token in all layers.",
)
@click.option("--model", help="Take the bytes of a token from this model, which is loaded for it.")
@click.option(
    "--block-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens that one id of FILE stands for.",
)
@click.option(
    "--idle-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds of the trace's time after which unused blocks leave the device.  [default: never]",
)
@json_option
def trace(file: Path | None, *, as_json: bool, output: Path | None, **options: Any) -> None:
    """Replay a trace of requests and say what a cache would have found.

    FILE has a JSON object on each line with timestamp (ms), input_length, output_length and hash_ids,
    one id for each 512 tokens of input: the format of the public Mooncake traces. The trace goes
    through the index, the eviction policies and the tiers as they are, with blocks of the right size
    and no bytes in them.
    """
    if (file is None) == (options["workload"] is None):
        raise click.UsageError("give either FILE or --generate")
    if output is not None and file is not None:
        raise click.UsageError("--output goes with --generate")
    with working("reading the trace" if file else "making a trace up") as say:
        from kvkeep.replay import Comparison, report_json, visits_of, write_trace

        settings = [] if output else _settings(options)
        requests = _requests(file, options)
        if output is not None:
            num_requests = write_trace(output, requests)
            stderr().print(f"[dim]{num_requests:,} requests written to {output}[/dim]")
            return
        comparison = Comparison(visits_of(requests, options["block_tokens"]))
        reports = []
        for one in settings:
            say(f"{format_bytes(one.capacity_bytes)}, {one.policy}")
            reports.append(comparison.replay(one))
    title = _title(file, options)
    if as_json:
        emit_json({"trace": title, "runs": [report_json(report) for report in reports]})
    else:
        _show(stdout(), title, reports)


def _settings(options: dict[str, Any]) -> "list[ReplaySettings]":
    """One for each size and policy."""
    from kvkeep.replay import ReplaySettings, parse_capacity, parse_tier

    tiers = tuple(parse_tier(text) for text in options["tiers"])
    sizes = [
        parse_capacity(text.strip(), field="capacities")
        for text in options["capacities"].split(",")
    ]
    bytes_per_token = options["bytes_per_token"]
    if options["model"] is not None:
        bytes_per_token = _model_bytes_per_token(options["model"])
    return [
        ReplaySettings(
            capacity_bytes=size,
            bytes_per_token=bytes_per_token,
            block_tokens=options["block_tokens"],
            policy=policy.strip(),
            tiers=tiers,
            idle_s=options["idle_s"],
        )
        for size, policy in product(sizes, options["policies"].split(","))
    ]


def _model_bytes_per_token(model: str) -> int:
    # Slow: loads torch and the model.
    from kvkeep.hf.geometry import measure_geometry
    from kvkeep.hf.load import load_model

    return measure_geometry(load_model(model).model, 1).spec.bytes_per_token


def _requests(file: Path | None, options: dict[str, Any]) -> "list[TraceRequest]":
    from kvkeep.replay import WORKLOADS, generate, read_trace

    if file is not None:
        return read_trace(file, block_tokens=options["block_tokens"])
    workload = WORKLOADS[options["workload"]]
    return generate(workload, num_requests=options["requests"], seed=options["seed"])


def _title(file: Path | None, options: dict[str, Any]) -> str:
    if file is not None:
        return str(file)
    return f"{options['workload']}, {options['requests']} requests, seed {options['seed']}"


def _show(console: Console, title: str, reports: "Sequence[ReplayReport]") -> None:
    columns = ("blocks", "tokens", "of unbounded", "of best", "prefixes", "of best", "evicted")
    table = new_table("device", "policy", *columns, "policy time", "look-ups/s")
    for report in reports:
        passed, rate = report.passed, report.block_rate
        table.add_row(
            format_bytes(report.settings.capacity_bytes),
            report.settings.policy,
            f"{rate(passed.hits):.1%}",
            f"{report.token_rate(passed.hits):.1%}",
            f"{report.share_of_ideal:.1%}",
            f"{report.share_of_optimum:.1%}",
            f"{rate(passed.prefix_hits):.1%}",
            f"{report.prefix_share_of_optimum:.1%}",
            f"{sum(level.num_evictions for level in report.levels):,}",
            f"{report.policy_s / max(1, passed.num_lookups) * 1e6:.2f} µs",
            f"{report.lookups_per_s:,.0f}",
        )
    show_whole_table(console, f"{title}: found in all places together", table)
    if reports[0].settings.tiers:
        console.print()
        _show_places(console, reports)
    console.print(Text("\n".join(_notes(reports)), style="dim"))


def _notes(reports: "Sequence[ReplayReport]") -> list[str]:
    one = max(reports, key=lambda report: report.num_requests)
    notes = [
        f"{one.passed.num_lookups:,} look-ups of blocks of {format_bytes(one.settings.block_bytes)}"
    ]
    notes.append(f"unbounded: {one.block_rate(one.ideal_hits):.1%} of the blocks are found")
    notes.append("best: by a cache of the same size that knows the future")
    refusals = (
        f"{report.num_refused:,} requests do not fit on {format_bytes(report.settings.capacity_bytes)} and "
        "count nowhere"
        for report in reports
        if report.num_refused
    )
    return [*notes, *dict.fromkeys(refusals)]


def _show_places(console: Console, reports: "Sequence[ReplayReport]") -> None:
    table = new_table(
        "device", "place", "policy", "blocks", "tokens", "read", "written", "evicted", "policy time"
    )
    for report in reports:
        for level in report.levels:
            is_device = level is report.levels[0]
            table.add_row(
                format_bytes(report.settings.capacity_bytes) if is_device else "",
                level.name if is_device else f"{level.name} {format_bytes(level.capacity_bytes)}",
                level.policy,
                f"{report.block_rate(level.hits):.1%}",
                f"{report.token_rate(level.hits):.1%}",
                "-" if is_device else format_bytes(level.read_bytes),
                "-" if is_device else format_bytes(level.written_bytes),
                f"{level.num_evictions:,}",
                f"{level.policy_s / max(1, report.passed.num_lookups) * 1e6:.2f} µs",
            )
    show_whole_table(console, "Each place", table)
