"""`kvkeep chat`: talk to a model, and see what each turn cost."""

import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Event
from typing import TYPE_CHECKING, Any

import click

from kvkeep.cli.console import Command, format_seconds, show_error, stderr
from kvkeep.cli.loading import open_llm, sampling_params
from kvkeep.cli.options import (
    capacity_options,
    format_options,
    model_options,
    sampling_options,
)
from kvkeep.cli.tier_options import tier_options
from kvkeep.config import SamplingParams
from kvkeep.config.sizes import format_bytes
from kvkeep.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from kvkeep.cache import Receipt
    from kvkeep.llm import LLM

__all__ = ["Conversation", "chat", "stopped_by_interrupt"]

_COMMANDS = "/stats what the cache holds, /clear begin anew, /quit leave"


@click.command(cls=Command)
@model_options
@click.option("--system", default="", help="The system prompt.")
@sampling_options(max_tokens=512, temperature=0.0)
@capacity_options
@format_options
@tier_options
def chat(system: str, **options: Any) -> None:
    """Talk to a model; every turn computes only what is new.

    Reads one message a line, from the terminal or a pipe. /stats shows what the cache holds, /clear
    begins a new conversation, /quit leaves. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    params = sampling_params(options)
    with open_llm(options) as llm:
        if sys.stdin.isatty():
            stderr().print(f"[dim]{options['model']} · {_COMMANDS}[/dim]")
        _talk(Conversation(llm, params, system))


def _talk(conversation: "Conversation") -> None:
    for line in _lines():
        match line.split():
            case []:
                continue
            case ["/quit" | "/exit"]:
                return
            case ["/clear"]:
                conversation.clear()
            case ["/stats"]:
                _note(conversation.stats())
            case [word] if word.startswith("/"):
                show_error(f"{word} is no command; {_COMMANDS}")
            case _:
                _take_turn(conversation, line)


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, llm: "LLM", params: SamplingParams, system: str) -> None:
        self._llm = llm
        self._params = params
        self._system = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = []
        self.receipt: Receipt | None = None
        # Fails now rather than after the first message.
        llm.encode_chat([*self._system, {"role": "user", "content": "."}])

    def clear(self) -> None:
        """Forget the messages; what the cache knows of them stays reusable."""
        self._messages.clear()

    def answer(self, text: str, stop: Event) -> Iterator[str]:
        """The answer to `text`, piece by piece; `stop` ends it, and what was said remains said.

        A request that is refused leaves the conversation as it was.
        """
        self.receipt = None
        asked = [*self._messages, {"role": "user", "content": text}]
        said = ""
        with closing(self._llm.stream([*self._system, *asked], self._params)) as pieces:
            for piece in pieces:
                said += piece.text
                self.receipt = piece.receipt
                yield piece.text
                if stop.is_set():
                    break
        self._messages = [*asked, {"role": "assistant", "content": said}]

    def stats(self) -> str:
        """What the cache holds, on one line."""
        stats = self._llm.cache.stats()
        num_blocks = sum(group.in_use + group.reusable for group in stats.groups)
        kept = stats.in_use_bytes + stats.reusable_bytes
        return (
            f"{num_blocks} blocks, {format_bytes(kept)} of {format_bytes(stats.capacity_bytes)} · "
            f"{stats.computed_tokens} tokens computed, {stats.reused_tokens} reused so far"
        )


def _take_turn(conversation: Conversation, text: str) -> None:
    """Print the answer and what it cost; in a terminal a refused message does not end the talk."""
    with stopped_by_interrupt() as stop:
        try:
            for piece in conversation.answer(text, stop):
                click.echo(piece, nl=False)
        except (RequestError, CapacityError) as error:
            if not sys.stdin.isatty():
                raise
            show_error(str(error))
            return
    click.echo()
    receipt = conversation.receipt
    if receipt is None or receipt.first_token_s is None:
        _note("stopped")
        return
    _note(
        f"{receipt.computed_tokens} computed, {receipt.reused_tokens} reused · "
        f"first token {format_seconds(receipt.first_token_s)}"
    )


def _note(text: str) -> None:
    stderr().print(f"[dim]{text}[/dim]", soft_wrap=True)


def _lines() -> Iterator[str]:
    """Messages as they are typed, or the lines of a pipe, until there are no more."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


@contextmanager
def stopped_by_interrupt() -> Iterator[Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as ever."""
    stop = Event()
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
