"""Tables of `kvkeep doctor`: linear layers, and KV formats."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvkeep.config.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvkeep.cli.doctor_formats import FormatRow
    from kvkeep.hf.format_probe import FormatProbe
    from kvkeep.hf.linear import LinearChoice

__all__ = [
    "linear_table",
    "new_table",
    "probe_line",
    "show_formats",
    "show_table",
    "show_whole_table",
]

# Tables take no more of it than they need.
_WIDEST = 10_000


def show_table(console: Console, title: str, table: Table) -> None:
    """A table under its title, cut to the width of a terminal; for programs nothing is."""
    if not console.is_terminal:
        show_whole_table(console, title, table)
        return
    console.print(Text(title, style="bold"))
    console.print(table)


def show_whole_table(console: Console, title: str, table: Table) -> None:
    """A table under its title, its lines as long as they have to be: a number that is cut is another one."""
    wide = Console(file=console.file, width=_WIDEST, highlight=False)
    wide.print(Text(title, style="bold"))
    wide.print(table)


def new_table(*columns: str) -> Table:
    """A table with these columns, the first one of names and all others of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    return table


def linear_table(linears: "Sequence[LinearChoice]") -> Table:
    """A line for each shape of layer."""
    table = new_table("outputs × inputs", "layers", "rows", "one row", "error", "float32 from")
    for one in linears:
        bias = " + bias" if one.has_bias else ""
        table.add_row(
            f"{one.num_outputs} × {one.num_inputs}{bias}",
            str(one.num_layers),
            str(one.most_rows),
            "-" if one.speed_up is None else f"{one.speed_up:.2g} × torch",
            f"{one.error:.1g}",
            "-" if one.wide_rows is None else f"{one.wide_rows} rows",
        )
    return table


def probe_line(probe: "FormatProbe") -> str:
    """What a probe found, in a line."""
    line = f"mean KLD {probe.kld:.2g} nats, same best token {probe.top1_agreement:.1%}"
    if probe.exact_layers:
        layers = ", ".join(map(str, probe.exact_layers))
        line += f"; {probe.whole_kld:.2g} nats if layers {layers} were not kept exact"
    return line


def show_formats(console: Console, rows: "Sequence[FormatRow]") -> None:
    """A line for each format, and below it how the numbers were made."""
    columns = ("per token", "smaller", "mean KLD", "same best", "exact layers", "tokens that fit")
    table = new_table("format", *columns)
    probe = None
    for row in rows:
        if row.probe is None or row.bytes_per_token is None:
            table.add_row(row.format, *["-"] * (len(columns) - 1), "cannot")
            continue
        probe = row.probe
        fits = "any number" if row.num_tokens is None else f"{row.num_tokens:,}"
        table.add_row(
            row.format,
            format_bytes(row.bytes_per_token),
            f"{row.ratio:.2f} ×",
            f"{probe.kld:.2g}",
            f"{probe.top1_agreement:.1%}",
            ", ".join(map(str, probe.exact_layers)) or "-",
            fits if probe.passed else "[red]refused[/red]",
        )
    show_table(console, "KV formats, against K/V as the model computes them", table)
    if probe is not None:
        console.print(
            Text(
                f"{probe.num_positions} positions; KLD in nats, the limit is {probe.limit:.2g}; the "
                f"model's own dtype in other chunks: {probe.noise_kld:.1g}, {probe.noise_top1_agreement:.1%}",
                style="dim",
            )
        )
