"""What a server or a folder says of its cache, for people."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from kvkeep.cli.console import stdout
from kvkeep.config.sizes import format_bytes

__all__ = [
    "show_groups",
    "show_kind",
    "show_known",
    "show_purge",
    "show_rows",
    "show_state",
    "since",
]

_GAP = "  "
# A text that is cut keeps as many characters.
_LEAST_WIDTH = 8
_SHOWN_DIGITS = 12
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table of one line a row; numbers to the right, "-" for None. `empty` where there are no rows.

    In a terminal the longest texts are cut until a line fits; for programs nothing is.
    """
    out = stdout()
    if not rows:
        out.print(empty)
        return
    cells = [[_cell(one) for one in row] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(cell_len(line[at]) for line in lines) for at in range(len(columns))]
    natural = list(widths)
    are_numbers = [
        all(row[at] is None or isinstance(row[at], int | float) for row in rows)
        for at in range(len(columns))
    ]
    if out.is_terminal:
        _shrink(widths, [at for at, one in enumerate(are_numbers) if not one], out.width)
    for number, line in enumerate(lines):
        style = "" if number else "bold"
        out.print(_line(line, widths, are_numbers), style=style, soft_wrap=True)
    if widths != natural:
        out.print("[dim]names are cut to fit; in a pipe, or with --json, they are whole[/dim]")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shrink(widths: list[int], cuttable: Sequence[int], width: int) -> None:
    """Make the widest of the `cuttable` columns narrower until a line fits, or nothing more can go."""
    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widest = max(cuttable, key=lambda at: widths[at], default=None)
        if widest is None or widths[widest] <= _LEAST_WIDTH:
            return
        widths[widest] -= 1


def _line(cells: Sequence[str], widths: Sequence[int], are_numbers: Sequence[bool]) -> Text:
    shown = []
    for cell, width, is_number in zip(cells, widths, are_numbers, strict=True):
        text = Text(cell)
        text.truncate(width, overflow="ellipsis")
        text.align("right" if is_number else "left", width)
        shown.append(text)
    line = Text(_GAP).join(shown)
    line.rstrip()
    return line


def show_state(state: Mapping[str, Any]) -> None:
    """The device and the tiers, and what was reused."""
    rows = [
        [
            name,
            _size(tier.get("capacity_bytes")),
            _size(tier.get("in_use_bytes")),
            _size(tier.get("reusable_bytes")),
            _size(tier.get("free_bytes")),
            int(tier.get("entries", 0)),
            int(tier.get("evictions", 0)),
        ]
        for name, tier in state["tiers"].items()
    ]
    show_rows(
        ["tier", "capacity", "in use", "reusable", "free", "entries", "evicted"],
        rows,
        empty="no tiers",
    )
    if "reused_tokens" in state:
        rate = state["hit_rate"]
        share = "nothing asked yet" if rate is None else f"{rate:.1%} of all tokens"
        stdout().print(
            f"{state['reused_tokens']:,} tokens reused, {state['computed_tokens']:,} computed ({share}), "
            f"{state['pins']} pins"
        )


def show_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """What bears the same labels, together."""
    rows = [
        [
            _who(one),
            ", ".join(one["tags"]),
            ", ".join(one["pins"]),
            one["blocks"],
            one["tokens"],
            format_bytes(one["bytes"]),
            ", ".join(f"{name} {count}" for name, count in one["tiers"].items()),
            since(one["used_at"]),
            since(one["expires_at"]) or "never",
        ]
        for one in groups
    ]
    columns = [
        *("used by", "tags", "pins", "blocks", "tokens", "size", "tiers", "last used", "expires"),
    ]
    if _have_tenants(groups):
        columns.append("tenant")
        for row, one in zip(rows, groups, strict=True):
            row.append(one["tenant"])
    show_rows(columns, rows, empty="nothing is cached")


def _have_tenants(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are of several tenants: the same name may stand there for each."""
    return len({one.get("tenant") for one in rows}) > 1


def show_kind(kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Sessions, contexts, pins or blocks, each a row.

    In a terminal keys of blocks are shown by their first digits, which other commands take for the whole.
    """
    if kind == "blocks" and stdout().is_terminal:
        rows = [{**one, "id": one["id"][:_SHOWN_DIGITS]} for one in rows]
    cell_of = _KIND_TO_CELLS[kind]
    if _have_tenants(rows):
        cell_of = cell_of | {"tenant": lambda one: one["tenant"]}
    columns = list(cell_of)
    cells = [[cell(one) for cell in cell_of.values()] for one in rows]
    show_rows(columns, cells, empty=f"no {kind}")


_Cells = dict[str, Callable[[Mapping[str, Any]], object]]
_KIND_TO_CELLS: dict[str, _Cells] = {
    "sessions": {
        "session": lambda one: one["id"],
        "blocks": lambda one: one["blocks"],
        "own": lambda one: one["own_blocks"],
        "tokens": lambda one: one["tokens"],
        "requests": lambda one: one["requests"],
        "context": lambda one: one["context"] or "",
        "last used": lambda one: since(one["used_at"]),
    },
    "contexts": {
        "context": lambda one: one["name"],
        "tokens": lambda one: one["tokens"],
        "known": lambda one: one["known_tokens"],
        "pinned": lambda one: "yes" if one["pinned"] else "no",
        "tags": lambda one: ", ".join(one["tags"]),
        "expires": lambda one: since(one["expires_at"]) or "never",
    },
    "pins": {
        "pin": lambda one: one["name"],
        "blocks": lambda one: one["blocks"],
        "on the device": lambda one: one["blocks_on_device"],
        "in tiers": lambda one: ", ".join(
            f"{tier} {count}" for tier, count in one["tiers"].items()
        ),
    },
    "blocks": {
        "block": lambda one: one["id"],
        "size": lambda one: format_bytes(one["bytes"]),
        "tiers": lambda one: ", ".join(one["tiers"]),
        "sessions": lambda one: ", ".join(one["sessions"]),
        "tags": lambda one: ", ".join(one["tags"]),
        "last used": lambda one: since(one["used_at"]),
    },
}


def show_known(known: Mapping[str, Any]) -> None:
    """What is known of a prompt, and why not more."""
    out = stdout()
    places = ", ".join(f"{count:,} {name}" for name, count in known["tiers"].items() if count)
    out.print(
        f"{known['known_tokens']:,} of {known['total_tokens']:,} tokens are cached"
        + (f" ({places})" if places else "")
        + f", {known['missing_tokens']:,} are to be computed"
    )
    if known.get("ttft_ms_est") is not None:
        out.print(f"first token in about {known['ttft_ms_est']:g} ms")
    miss = known.get("miss")
    if miss is None:
        return
    where = ""
    if miss["first_divergent_token"] is not None:
        where = f" from token {miss['first_divergent_token']:,}"
    if miss["message_index"] is not None:
        where += f", in message {miss['message_index']}"
    out.print(f"missed: {miss['type']}{where}; {miss['missed_tokens']:,} tokens lost")
    if miss.get("cached_text") is not None:
        out.print(Text(f"  cached: {miss['cached_text']!r}"), soft_wrap=True)
        out.print(Text(f"  sent:   {miss['sent_text']!r}"), soft_wrap=True)


def show_purge(receipt: Mapping[str, Any]) -> None:
    """What a purge did, or would do."""
    verb = "would be deleted" if receipt["dry_run"] else "deleted"
    parts = [f"{receipt['matched']:,} blocks matched, {receipt['deleted']:,} {verb}"]
    parts.append(f"{format_bytes(receipt['freed_bytes'])} freed")
    if receipt["skipped_pinned"]:
        parts.append(f"{receipt['skipped_pinned']:,} are pinned and stay (--include-pinned)")
    if receipt["skipped_in_use"]:
        parts.append(f"{receipt['skipped_in_use']:,} stay with running requests alone")
    parts += [f"{count:,} objects in {name}" for name, count in receipt["tiers"].items() if count]
    parts += [
        f"{name} does not answer and is told later" for name in receipt.get("not_reached", ())
    ]
    stdout().print("; ".join(parts), soft_wrap=True)


def since(time: str | None, *, now: datetime | None = None) -> str:
    """A time as how long ago it is, or in how long; "" for none.

    >>> noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    >>> since("2026-01-02T10:00:00+00:00", now=noon), since("2026-01-02T12:05:00+00:00", now=noon)
    ('2 h ago', 'in 5 min')
    """
    if time is None:
        return ""
    seconds = (datetime.fromisoformat(time) - (now or datetime.now(UTC))).total_seconds()
    for size, unit in _UNITS:
        if abs(seconds) >= size:
            number = f"{abs(seconds) / size:.0f} {unit}"
            return f"in {number}" if seconds > 0 else f"{number} ago"
    return "now"


def _who(one: Mapping[str, Any]) -> str:
    names = list(one["sessions"])
    if one["shared"]:
        names.append("all")
    return ", ".join(names) or "nobody"


def _size(num_bytes: object) -> str:
    return format_bytes(num_bytes) if isinstance(num_bytes, int | float) else "-"
