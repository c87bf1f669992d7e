"""`kvkeep cache lint`: what in a request keeps the next ones from using what it leaves behind."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kvkeep.cli.client import read_json_file
from kvkeep.cli.console import EXIT_CHECK_FAILED, Command, emit_json, stdout
from kvkeep.cli.options import BUNDLED_MODEL, json_option

if TYPE_CHECKING:
    from kvkeep.cache.explain import Finding

__all__ = ["lint"]


@click.command(cls=Command)
@click.argument("requests", nargs=-1, required=True, metavar="REQUEST...")
@click.option(
    "--model",
    help="A folder with a model's tokenizer, or the bundled model: counts its tokens, and reads its "
    "chat template.  [default: four characters count as one token]",
)
@json_option
@click.pass_context
def lint(
    ctx: click.Context, /, *, requests: tuple[str, ...], model: str | None, as_json: bool
) -> None:
    """Name what in a REQUEST will break reuse.

    That is dates, counters and ids early in the prompt, and an order that changes. REQUEST is a file of JSON;
    each is compared with the one before it, so that two requests of one program tell more than one. "-" is
    stdin. The exit code is 1 when something breaks reuse for certain.
    """
    from kvkeep.cache.explain import PROMPT_FIELDS, Severity, lint_request

    count, template = (None, None) if model is None else _tokenizer_of(model)
    found: list[tuple[str, Finding]] = []
    earlier: dict[str, Any] | None = None
    for file in requests:
        request = read_json_file(file)
        if not isinstance(request, dict):
            raise click.UsageError(f"{file} is no request; it has to be a JSON object")
        if not any(request.get(name) for name in PROMPT_FIELDS):
            raise click.UsageError(
                f"{file} has no prompt; a request needs messages, prompt, input, system or instructions"
            )
        _check_forms(file, request)
        findings = lint_request(request, count, earlier=earlier, template=template)
        found += [(file, one) for one in findings]
        earlier = request
    if as_json:
        emit_json({"findings": [{"file": file, **asdict(one)} for file, one in found]})
    else:
        _show(found)
    if any(one.severity is Severity.BREAKS for _, one in found):
        ctx.exit(EXIT_CHECK_FAILED)


def _check_forms(file: str, request: dict[str, Any]) -> None:
    """Raise UsageError for a prompt that no server would take: of it nothing can be said."""
    for name in ("prompt", "input", "system", "instructions"):
        if not isinstance(request.get(name), str | list | None):
            raise click.UsageError(
                f"{file}: {name}={request[name]!r:.80} is no prompt; give text or a list"
            )
    messages = request.get("messages")
    if messages is None:
        return
    if not isinstance(messages, list):
        raise click.UsageError(
            f"{file}: messages={messages!r:.80} is no list; give messages as in chat"
        )
    for number, message in enumerate(messages):
        is_message = isinstance(message, dict) and ("content" in message or "tool_calls" in message)
        if not is_message:
            raise click.UsageError(
                f"{file}: messages[{number}]={message!r:.80} has no content; give it"
            )


def _show(found: "list[tuple[str, Finding]]") -> None:
    out = stdout()
    for file, one in found:
        out.print(
            Text(f"{file}: {one.where}: {one.severity.replace('_', ' ')}: {one.what}"),
            soft_wrap=True,
        )
        out.print(Text(f"    {one.why}"), soft_wrap=True)
        out.print(Text(f"    remedy: {one.remedy}"), soft_wrap=True)
    if not found:
        out.print("nothing found that would break reuse")


def _tokenizer_of(model: str) -> tuple[Callable[[str], int], str | None]:
    """How many tokens a text has, and the chat template, read without loading the model."""
    from tokenizers import Tokenizer

    folder = (
        Path(__file__).parent.parent / "bundled" / model if model == BUNDLED_MODEL else Path(model)
    )
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:
        # The library raises nothing more precise.
        raise click.UsageError(
            f"--model={model!r} has no tokenizer.json that can be read"
        ) from error

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    return count, _template_of(folder)


def _template_of(folder: Path) -> str | None:
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    template = None
    if settings.is_file():
        template = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None
