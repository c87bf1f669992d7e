"""Options of `kvkeep serve` that are fields of ServerSettings, and the settings that they and others make."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import click

from kvkeep.cli.tier_options import is_given
from kvkeep.config.server import ServerSettings, server_kinds
from kvkeep.config.sizes import format_bytes
from kvkeep.config.sources import LoadedSettings
from kvkeep.errors import ConfigError
from kvkeep.tiers.settings import TierSettings

__all__ = ["server_flags", "server_options", "server_settings"]

_Command = Callable[..., Any]
# Files beside the blocks that they belong to.
_SECRET, _CONTEXTS, _QUOTAS = ".server-secret", ".contexts", ".quotas"
# By the name of the field they fill.
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
            metavar="KEY",
            help="Asked of requests that see or remove what is not their own; better KVKEEP_ADMIN_KEY.  "
            "[default: any API key]",
        ),
        click.option(
            "--share-between-keys",
            "isolate_keys",
            flag_value=False,
            default=_default("isolate_keys"),
            help="All keys belong to one owner: one cache for all.",
        ),
        click.option(
            "--secret-file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Keeps what the keys' caches are told apart by.  [default: beside the disk tier]",
        ),
        click.option(
            "--contexts-file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Keeps the names and tokens of contexts.  [default: beside the disk tier]",
        ),
        click.option(
            "--quotas-file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Keeps the quotas of tenants.  [default: beside the disk tier]",
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


def server_flags(context: click.Context) -> dict[str, object]:
    """The fields of ServerSettings that options of a command give, those that were typed."""
    options = context.params
    names = [name for name in server_kinds() if name in options and is_given(context, name)]
    flags: dict[str, Any] = {name: options[name] for name in names}
    if options["api_keys_file"] is not None:
        flags["api_keys"] = (*flags.get("api_keys", ()), *_keys_in(options["api_keys_file"]))
    return flags


def server_settings(loaded: LoadedSettings, tiers: Sequence[TierSettings]) -> ServerSettings:
    """The settings of a server: those that somebody gave, and files beside the first of `tiers` on a disk.

    Reads the files of [[warm]]. Raises ConfigError, naming the place of what cannot be.
    """
    beside = _folder(tiers)
    given: dict[str, Any] = dict(loaded.server)
    if not given.get("api_keys"):
        # Without keys there is nobody to tell apart.
        given["secret_file"] = None
    elif "secret_file" not in given:
        given["secret_file"] = _named(beside or Path("~/.cache/kvkeep").expanduser(), _SECRET)
    if beside is not None:
        given.setdefault("contexts_file", _named(beside, _CONTEXTS))
        given.setdefault("quotas_file", _named(beside, _QUOTAS))
    given["warm"] = tuple(one for table in loaded.warm for one in table.prompts())
    try:
        return ServerSettings(**given)
    except ConfigError as error:
        raise loaded.blamed(error) from error


def _folder(tiers: Sequence[TierSettings]) -> Path | None:
    for tier in tiers:
        folder = getattr(tier, "folder", None)
        if isinstance(folder, str | Path):
            return Path(folder).expanduser().absolute()
    return None


def _named(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def _keys_in(path: Path) -> Sequence[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"api_keys_file={str(path)!r} cannot be read as text ({error}); give another file"
        ) from error
    keys = [key for line in lines if (key := line.partition("#")[0].strip())]
    if not keys:
        # Without a key everybody would be let in.
        raise ConfigError(
            f"api_keys_file={str(path)!r} has no key; write one on a line, or leave the flag out"
        )
    return keys
