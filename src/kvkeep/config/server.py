"""Where the server listens, who may use it, and its limits."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from math import isfinite
from pathlib import Path

from kvkeep.config.durations import parse_duration
from kvkeep.config.fields import field_kinds, value_from_text, value_from_toml
from kvkeep.config.sizes import parse_bytes
from kvkeep.config.warm import WarmPrompt
from kvkeep.errors import ConfigError

__all__ = [
    "MIN_KEY_CHARACTERS",
    "SECRET_FIELDS",
    "ServerSettings",
    "is_loopback",
    "server_kinds",
    "server_value",
]

MIN_KEY_CHARACTERS = 8
_LOG_FORMATS = ("text", "json")
_METRICS_COMPAT = (None, "vllm")
_MAX_PORT = 65535
# "null" is what browsers send of pages from files.
_ANY_ORIGIN = ("*", "null")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+", re.IGNORECASE)
# Fields whose values nobody is shown.
SECRET_FIELDS = ("api_keys", "admin_key")
_WARM = "warm"
# What a share of it would be a share of: there is nothing, so that the limit on it is as good as none.
_ANY_TOTAL = 2**40


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Where the server listens, who may use it, and its limits.

    Who and where:
        host, port: a host that is not loopback needs `api_keys`. Port 0 takes a free one.
        api_keys: one of them must come with every request; none: everybody on this machine.
        admin_key: what routes that remove or list things of others want; None: any API key will do.
        allowed_origins: web pages of these origins may call the server; "*" for all.
        isolate_keys: keys do not share blocks; False when all keys belong to one owner.
        open_metrics: /metrics answers without a key.
        model_names: further names that requests may give the model; "*" accepts every name.
        secret_file: keeps the secret that salts are derived with, made when it is not there; None: a new
            secret in every process, so that blocks of tenants are of no use after a restart.
        contexts_file, quotas_file: keep contexts and quotas over a restart; None: they end with the process.
    Limits; what is beyond is refused with 413, 400 or 429:
        max_body_bytes: of one request.
        max_prompt_tokens: None: what the model can take.
        max_queued: requests that may wait beyond those that the engine runs at once.
        max_requests_per_key: at once, waiting or running; None: no limit of its own.
    Times, in seconds:
        body_timeout_s: for a whole request to arrive, and for a client to take anything of an answer.
        request_timeout_s: from arrival to the last token.
        keep_alive_s: a stream that has nothing to say sends a comment so often.
        idle_connection_s: a connection without request is closed after it.
        drain_s: what running requests have to finish when the server stops.
        status_s: between two lines about the state in the log, while there is any change; 0: none.
    tokenizer_threads encode prompts. log_format is "text" or "json". metrics_compat "vllm" adds its names.
    otlp_endpoint: traces go to this collector ("http://localhost:4318"), which needs the extra otel.
    """

    host: str = "127.0.0.1"
    port: int = 8010
    api_keys: Sequence[str] = ()
    admin_key: str | None = None
    allowed_origins: Sequence[str] = ()
    isolate_keys: bool = True
    open_metrics: bool = False
    model_names: Sequence[str] = ()
    secret_file: Path | None = None
    contexts_file: Path | None = None
    quotas_file: Path | None = None
    warm: Sequence[WarmPrompt] = ()
    max_body_bytes: int = 16 * 2**20
    max_prompt_tokens: int | None = None
    max_queued: int = 256
    max_requests_per_key: int | None = None
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    idle_connection_s: float = 30.0
    drain_s: float = 30.0
    status_s: float = 30.0
    tokenizer_threads: int = 2
    log_format: str = "text"
    metrics_compat: str | None = None
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_keys()
        if self.log_format not in _LOG_FORMATS:
            raise ConfigError(f'log_format={self.log_format!r} is unknown; give "text" or "json"')
        if self.metrics_compat not in _METRICS_COMPAT:
            raise ConfigError(
                f'metrics_compat={self.metrics_compat!r} is unknown; give "vllm" or none'
            )
        if not is_loopback(self.host) and not self.api_keys:
            raise ConfigError(
                f"host={self.host!r} lets other machines in, and api_keys is empty; set a key "
                "(--api-key, KVKEEP_API_KEYS), or listen on 127.0.0.1"
            )

    def _check_numbers(self) -> None:
        least = {
            "max_body_bytes": 1,
            "max_queued": 0,
            "tokenizer_threads": 1,
            "max_prompt_tokens": 1,
            "max_requests_per_key": 1,
        }
        for field, smallest in least.items():
            value = getattr(self, field)
            if value is None and field in ("max_prompt_tokens", "max_requests_per_key"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(f"{field}={value!r} is no whole number from {smallest} on")
        if not 0 <= self.port <= _MAX_PORT:
            raise ConfigError(f"port={self.port!r} is no port; give 0 to {_MAX_PORT}")
        times = ("body_timeout_s", "request_timeout_s", "keep_alive_s", "idle_connection_s")
        for field in times:
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field}={getattr(self, field)!r} is no time; give seconds > 0")
        for field in ("drain_s", "status_s"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"{field}={getattr(self, field)!r} is no time; give seconds >= 0")

    def _check_keys(self) -> None:
        for field in ("api_keys", "allowed_origins", "model_names"):
            if isinstance(getattr(self, field), str):
                raise ConfigError(f"{field} is one text; give a sequence of texts")
        for name in self.model_names:
            if not name.strip():
                raise ConfigError(f'model_names has {name!r}; give a name, or "*" for any')
        for origin in self.allowed_origins:
            if origin not in _ANY_ORIGIN and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"allowed_origins has {origin!r}, which is none; give it as browsers send it, such as "
                    'https://example.org, or "*" for all'
                )
        admin = () if self.admin_key is None else (self.admin_key,)
        # A key is a secret: messages do not repeat it.
        for key in (*self.api_keys, *admin):
            if len(key) < MIN_KEY_CHARACTERS or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"api_keys or admin_key has a key of {len(key)} characters that cannot be sent or is "
                    f"easily guessed; give {MIN_KEY_CHARACTERS} or more printable ASCII characters"
                )
        if self.admin_key is not None and self.admin_key in self.api_keys:
            raise ConfigError("admin_key is one of api_keys; give it a key of its own, or none")


def server_kinds() -> Mapping[str, tuple[object, ...]]:
    """The fields that a table [server], variables and flags may give, and their types."""
    return {name: kinds for name, kinds in field_kinds(ServerSettings).items() if name != _WARM}


def server_value(
    field: str, value: object, kinds: tuple[object, ...], *, is_text: bool = False
) -> object:
    """The value of a field as it is written: times as "30s", sizes as "16MB", keys with spaces between.

    With `is_text` text stands for values of all types. Raises ConfigError, for keys without repeating them.
    """
    if field in SECRET_FIELDS:
        return _secret(field, value)
    if field.endswith("_s"):
        seconds = parse_duration(field, value)
        if not isfinite(seconds):
            raise ConfigError(
                f'{field}={value!r} has no end; give a long time instead, such as "30d"'
            )
        return seconds
    if field.endswith("_bytes") and isinstance(value, str):
        return parse_bytes(value, total_bytes=_ANY_TOTAL, field=field)
    if is_text and isinstance(value, str):
        return value_from_text(field, value, kinds)
    return value_from_toml(field, value, kinds)


def _secret(field: str, value: object) -> object:
    if field == "api_keys":
        keys = value.split() if isinstance(value, str) else value
        if isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys):
            return tuple(keys)
        raise ConfigError("api_keys is no list of texts; write every key in quotes")
    if value is None or isinstance(value, str):
        return value
    raise ConfigError(f"{field} is no text; write it in quotes")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as reachable.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
