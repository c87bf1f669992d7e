"""`kvkeep doctor`: can this model be served here, how, and how much fits. Everything is measured."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvkeep.cli.console import (
    EXIT_CAPACITY,
    EXIT_UNSUPPORTED,
    Command,
    emit_json,
    show_error,
    stdout,
    working,
)
from kvkeep.cli.doctor_tables import (
    linear_table,
    new_table,
    probe_line,
    show_formats,
    show_table,
)
from kvkeep.cli.loading import engine_settings
from kvkeep.cli.options import (
    capacity_options,
    device_option,
    dtype_option,
    format_options,
    json_option,
)
from kvkeep.config.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvkeep.cli.doctor_report import Environment, Fit, Report
    from kvkeep.hf.selftest import SelfTest
    from kvkeep.spec import KVSpec

__all__ = ["doctor"]

# Requests of these many tokens are counted.
_LENGTHS = (4096, 32_768)


@click.command(cls=Command)
@click.argument("model")
@dtype_option
@device_option
@capacity_options
@format_options
@click.option(
    "--formats",
    "with_formats",
    is_flag=True,
    help="Measure every KV format on the model: bytes, and what it does to the outputs.",
)
@json_option
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    *,
    model: str,
    dtype: str | None,
    device: str | None,
    with_formats: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say whether MODEL can be served here, in which mode, and how much fits.

    Loads the model, compares what it computes over the cache with what it computes on its own, and counts
    bytes. MODEL is a path, a hub id, or "tiny" for the bundled one. The exit code is 3 when no mode is
    right, or when the format asked for changes outputs too much.
    """
    settings = engine_settings()
    with working(f"loading torch and {model}") as say:
        from kvkeep.cli.doctor_report import examine  # slow: loads torch

        report = examine(
            model,
            settings,
            dtype=dtype,
            device=device,
            lengths=_LENGTHS,
            with_formats=with_formats,
            say=say,
        )
    if as_json:
        emit_json(_as_json(report))
    else:
        _show(stdout(), report)
    for problem, exit_code in ((report.refusal, EXIT_UNSUPPORTED), (report.no_fit, EXIT_CAPACITY)):
        if problem is not None:
            show_error(problem)
            ctx.exit(exit_code)


def _as_json(report: "Report") -> dict[str, Any]:
    values = asdict(report)
    if report.spec is not None:
        sizes = {
            "bytes_per_token": report.spec.bytes_per_token,
            "state_bytes": sum(group.state_bytes for group in report.spec.groups),
            "block_bytes": report.spec.block_bytes(),
        }
        values["spec"] |= sizes
    return values | {"served": report.self_test is not None}


def _show(console: Console, report: "Report") -> None:
    _show_facts(console, _environment_facts(report.environment))
    _show_facts(console, _model_facts(report))
    if report.spec is not None:
        show_table(console, "KV groups", _group_table(report.spec))
    if report.self_test is not None:
        num_tokens = report.self_test.num_tokens
        title = f"Self-test: {num_tokens} tokens; errors are relative to the largest logit"
        show_table(console, title, _trial_table(report.self_test))
    if report.linears:
        title = "Linear layers: rows up to which the kernel computes them, else torch"
        show_table(console, title, linear_table(report.linears))
    if report.fits:
        show_table(console, "What fits", _fit_table(report.fits))
    if report.formats:
        show_formats(console, report.formats)


def _environment_facts(environment: "Environment") -> dict[str, str]:
    flags = ", ".join(environment.cpu_flags) or "unknown"
    absent = f"none ({environment.kernels_absent}); decoding reads pages through torch, more slowly"
    return {
        "kvkeep": environment.kvkeep,
        "Python": environment.python,
        "torch": f"{environment.torch}, {environment.num_threads} threads",
        "CPU": f"{environment.num_cpus} cores; {flags}; torch uses {environment.torch_cpu_capability}",
        "kernels": environment.kernels or absent,
        "device": f"{environment.device} ({environment.device_name})",
        "free memory": format_bytes(environment.free_bytes),
    }


def _model_facts(report: "Report") -> dict[str, str]:
    facts = {
        "model": f"{report.model} ({report.architecture})",
        "weights": f"{report.num_parameters:,} parameters in {report.dtype}",
        "context": f"{report.max_context:,} tokens",
    }
    if report.spec is not None:
        spec = report.spec
        facts["KV per token"] = format_bytes(spec.bytes_per_token)
        if spec.is_recurrent:
            state_bytes = sum(group.state_bytes for group in spec.groups)
            facts["state"] = f"{format_bytes(state_bytes)} for each request and saved block"
        facts["KV per block"] = f"{format_bytes(spec.block_bytes())} ({spec.block_size} tokens)"
        facts["KV format"] = spec.kv_format
    if report.format_probe is not None:
        facts["KV quality"] = probe_line(report.format_probe)
    chosen = "none: the model is refused"
    if report.self_test is not None:
        has_kernels = report.self_test.with_kernels
        chosen = f"{report.self_test.mode}, attention by {'kernels' if has_kernels else 'torch'}"
    return facts | {"mode": chosen}


def _show_facts(console: Console, facts: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    console.print(table)
    console.print()


def _group_table(spec: "KVSpec") -> Table:
    columns = ("group", "layers", "window", "key heads", "value heads", "per token", "per block")
    table = new_table(*columns)
    for group in spec.block_classes:
        table.add_row(
            group.name,
            str(len(group.layers)),
            "-" if group.window is None else str(group.window),
            f"{group.k_heads} × {group.k_dim}" if group.k_heads else "-",
            f"{group.v_heads} × {group.v_dim}" if group.v_heads else "-",
            format_bytes(group.bytes_per_token) if group.bytes_per_token else "-",
            format_bytes(group.block_bytes(spec.block_size)),
        )
    return table


def _trial_table(self_test: "SelfTest") -> Table:
    table = new_table("mode", "error", "tolerance", "verdict")
    for trial in self_test.trials:
        is_chosen = (trial.mode, trial.with_kernels) == (self_test.mode, self_test.with_kernels)
        error = trial.failure if trial.error is None else f"{trial.error:.2g}"
        table.add_row(
            trial.name,
            error,
            f"{self_test.tolerance:.2g}",
            "[green]chosen[/green]" if is_chosen else "[red]not right[/red]",
        )
    return table


def _fit_table(fits: "Sequence[Fit]") -> Table:
    lengths = [f"requests of {length:,}" for length in fits[0].requests_of]
    table = new_table("cache", "bytes", "tokens", *lengths)
    for name, fit in zip(("the capacity", "free memory"), fits, strict=True):
        table.add_row(
            name,
            format_bytes(fit.capacity_bytes),
            "any number" if fit.num_tokens is None else f"{fit.num_tokens:,}",
            *(f"{count:,}" for count in fit.requests_of.values()),
        )
    return table
