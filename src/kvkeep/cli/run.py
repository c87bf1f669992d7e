"""`kvkeep run`: complete one prompt."""

import sys
from dataclasses import asdict
from typing import Any

import click

from kvkeep.cache import Receipt
from kvkeep.cli.console import Command, emit_json, format_seconds, stderr
from kvkeep.cli.loading import open_llm, sampling_params
from kvkeep.cli.options import (
    capacity_options,
    default_of,
    format_options,
    json_option,
    model_options,
    sampling_options,
)
from kvkeep.cli.tier_options import tier_options
from kvkeep.config import SamplingParams
from kvkeep.planning import DEVICE

__all__ = ["describe_receipt", "run"]


@click.command(cls=Command)
@click.argument("prompt")
@model_options
@sampling_options(
    max_tokens=default_of(SamplingParams, "max_tokens"),
    temperature=default_of(SamplingParams, "temperature"),
)
@capacity_options
@format_options
@tier_options
@json_option
def run(prompt: str, *, as_json: bool, **options: Any) -> None:
    """Complete PROMPT and print the text as it comes.

    A PROMPT of "-" is read from stdin, without the newline at its end. What was computed, what was
    reused and how long it took goes to stderr.
    """
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    params = sampling_params(options)
    pieces = []
    with open_llm(options) as llm:
        for piece in llm.stream(prompt, params):
            pieces.append(piece)
            if not as_json:
                click.echo(piece.text, nl=False)
    last = pieces[-1]
    assert last.receipt is not None
    assert last.finish_reason is not None
    if as_json:
        emit_json(
            {
                "model": options["model"],
                "text": "".join(piece.text for piece in pieces),
                "token_ids": [token for piece in pieces for token in piece.token_ids],
                "finish_reason": last.finish_reason.value,
                "receipt": asdict(last.receipt),
            }
        )
        return
    click.echo()
    stderr().print(f"[dim]{describe_receipt(last.receipt)}[/dim]", soft_wrap=True)


def describe_receipt(receipt: Receipt) -> str:
    """What a request cost, on one line."""
    by_tier = [
        f"{count} from {source}"
        for source, count in receipt.tokens_by_source.items()
        if count and source not in (DEVICE, "computed")
    ]
    where = f" ({', '.join(by_tier)})" if by_tier else ""
    first = "" if receipt.first_token_s is None else format_seconds(receipt.first_token_s)
    return (
        f"prompt {receipt.prompt_tokens} tokens: {receipt.computed_tokens} computed, "
        f"{receipt.reused_tokens} reused{where} · first token {first or 'none'} · "
        f"{receipt.output_tokens} tokens in {format_seconds(receipt.total_s)}"
    )
