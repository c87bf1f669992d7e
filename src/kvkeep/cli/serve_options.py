"""Options of `kvkeep serve` that are fields of ServerSettings, and where keys come from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from math import isfinite
from pathlib import Path
from typing import Any

import click

from kvkeep.config.durations import parse_duration
from kvkeep.config.sizes import format_bytes, parse_bytes
from kvkeep.errors import ConfigError
from kvkeep.server.settings import ServerSettings

__all__ = ["server_options", "server_settings"]

_Command = Callable[..., Any]
# By the name of the field they fill; a file or the environment may hold keys as well.
_TIMES = {
    "request_timeout_s": "A request ends after it, finished or not.",
    "body_timeout_s": "A request must have arrived by then; who reads nothing for so long is cut off.",
    "keep_alive_s": "A stream with nothing to say sends a comment so often.",
    "idle_connection_s": "A connection without a request is closed after it.",
    "drain_s": "What running requests have to finish when the server stops.",
    "status_s": "Time between two lines about the state in the log; 0 for none.",
}


def _default(name: str) -> Any:  # noqa: ANN401  of whatever type the field is
    default = next(field.default for field in fields(ServerSettings) if field.name == name)
    assert default is not MISSING
    return default


def server_options(function: _Command) -> _Command:
    """All of them, in the order of the help."""
    for option in reversed([*_place_and_pages(), *_keys(), *_limits(), *_times(), *_records()]):
        function = option(function)
    return function


def _place_and_pages() -> list[Callable[[_Command], _Command]]:
    return [
        click.option(
            "--host", default=_default("host"), show_default=True, help="Where to listen."
        ),
        click.option(
            "--port",
            type=int,
            default=_default("port"),
            show_default=True,
            help="0 for a free one.",
        ),
        click.option(
            "--allowed-origin",
            "allowed_origins",
            multiple=True,
            metavar="ORIGIN",
            help='Web pages from there may call the server; repeatable, "*" for all.',
        ),
        click.option("--open-metrics", is_flag=True, help="/metrics answers without a key."),
        click.option(
            "--model-name",
            "model_names",
            multiple=True,
            metavar="NAME",
            help='A further name of the model in requests; repeatable, "*" for any.',
        ),
    ]


def _keys() -> list[Callable[[_Command], _Command]]:
    return [
        click.option(
            "--api-key",
            "api_keys",
            multiple=True,
            envvar="KVKEEP_API_KEYS",
            metavar="KEY",
            help="Asked of every request; repeatable, and every key has a cache of its own. Other users "
            "of this machine see flags: better KVKEEP_API_KEYS, keys with spaces between, or a file.",
        ),
        click.option(
            "--api-keys-file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="One key on a line; what follows a # is a remark.",
        ),
        click.option(
            "--admin-key",
            envvar="KVKEEP_ADMIN_KEY",
            metavar="KEY",
            help="Asked of requests that see or remove what is not their own.  [default: any API key]",
        ),
        click.option(
            "--share-between-keys",
            is_flag=True,
            help="All keys belong to one owner: one cache for all.",
        ),
        click.option(
            "--secret-file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Keeps what the keys' caches are told apart by.  [default: beside the disk tier]",
        ),
    ]


def _limits() -> list[Callable[[_Command], _Command]]:
    return [
        click.option(
            "--max-body",
            "max_body_bytes",
            default=format_bytes(_default("max_body_bytes")),
            show_default=True,
            metavar="SIZE",
            help="Of one request.",
        ),
        click.option(
            "--max-prompt-tokens",
            type=int,
            help="Of one prompt.  [default: what the model can take]",
        ),
        click.option(
            "--max-queued",
            type=int,
            default=_default("max_queued"),
            show_default=True,
            help="Requests that may wait.",
        ),
        click.option(
            "--max-requests-per-key",
            type=int,
            help="Waiting or running at once.  [default: no limit]",
        ),
    ]


def _times() -> list[Callable[[_Command], _Command]]:
    return [
        click.option(
            f"--{name.removesuffix('_s').replace('_', '-')}",
            name,
            default=f"{_default(name):g}s",
            show_default=True,
            metavar="TIME",
            help=text,
        )
        for name, text in _TIMES.items()
    ]


def _records() -> list[Callable[[_Command], _Command]]:
    return [
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default=_default("log_format"),
            show_default=True,
            help="Of the log, which goes to stderr.",
        ),
        click.option(
            "--metrics-compat",
            type=click.Choice(["vllm"]),
            help="Further names of the same metrics.",
        ),
        click.option(
            "--otlp-endpoint", metavar="URL", help="Send traces there; needs the extra otel."
        ),
    ]


def server_settings(options: Mapping[str, Any], *, secret_file: Path | None) -> ServerSettings:
    """What the options of `server_options` ask for; `secret_file` is the default of that option."""
    names = {field.name for field in fields(ServerSettings)}
    given = {name: options[name] for name in names if options.get(name) is not None}
    for name in _TIMES:
        given[name] = _seconds(name, given[name])
    given["max_body_bytes"] = parse_bytes(
        given["max_body_bytes"], total_bytes=_default("max_body_bytes"), field="max_body_bytes"
    )
    keys = (*given["api_keys"], *_keys_in(options["api_keys_file"]))
    secret_file = given.get("secret_file", secret_file)
    return ServerSettings(
        **given
        | {
            "api_keys": keys,
            "isolate_keys": not options["share_between_keys"],
            # Without keys there is nobody to tell apart.
            "secret_file": secret_file if keys else None,
        }
    )


def _seconds(name: str, text: str) -> float:
    seconds = parse_duration(name, text)
    if not isfinite(seconds):
        raise ConfigError(f'{name}={text!r} has no end; give a long time instead, such as "30d"')
    return seconds


def _keys_in(path: Path | None) -> Sequence[str]:
    if path is None:
        return ()
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [line.partition("#")[0].strip() for line in lines]
    return [key for key in keys if key]
