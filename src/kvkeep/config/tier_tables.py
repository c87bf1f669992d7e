"""Tiers as people write them: a table in TOML, or one word of text. What they mean is kvkeep.tiers' business.

host:4GB
disk:~/.cache/kvkeep:50GB?durable=true&write_on=reused,idle
redis://user:password@host:6379/0?timeout_s=0.5      s3://bucket/prefix?region=eu-west-1
tape?drive=/dev/st0                                  a kind that an installed package adds
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from kvkeep.errors import ConfigError

__all__ = ["TierTable", "parse_tier", "parse_tiers"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PASSWORD = re.compile(r"(://[^:/?#@]*):.*@")
_SECRET_WORDS = ("secret", "password", "access_key")


@dataclass(frozen=True, slots=True, repr=False)
class TierTable:
    """The kind of a tier and its options by name, values unchecked; as text as users write it, no secrets.

    The kind of a tier that is written as an address is the address's scheme.
    """

    kind: str
    options: Mapping[str, object]

    def __repr__(self) -> str:
        return f"TierTable({self.kind!r}, {dict(self.shown_options)!r})"

    def __str__(self) -> str:
        options = {name: _written(value) for name, value in self.shown_options.items()}
        head = options.pop("url", self.kind)
        for name in ("folder", "capacity"):
            if name in options:
                head += f":{options.pop(name)}"
        if not options:
            return head
        words = "&".join(f"{name}={value}" for name, value in options.items())
        return f"{head}{'&' if '?' in head else '?'}{words}"

    @property
    def shown_options(self) -> Mapping[str, object]:
        """The options without secrets."""
        return {name: _without_secrets(name, value) for name, value in self.options.items()}


def parse_tiers(text: str) -> tuple[TierTable, ...]:
    """The tiers of a text, nearest first, with spaces between them; quotes keep a path with spaces whole.

    >>> [table.kind for table in parse_tiers("host:4GB 'disk:/my cache:50GB' redis://h")]
    ['host', 'disk', 'redis']
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"tiers={text!r} cannot be read ({error}); close the quote") from error
    return tuple(parse_tier(word) for word in words)


def parse_tier(text: str) -> TierTable:
    """The table that one tier's text stands for. Raises ConfigError for text that is none.

    >>> parse_tier("disk:/x:50GB?durable=true")
    TierTable('disk', {'folder': '/x', 'capacity': '50GB', 'durable': 'true'})
    """
    scheme = _SCHEME.match(text)
    if scheme is not None:
        return TierTable(scheme[1].lower(), {"url": text})
    body, _, query = text.partition("?")
    kind, _, rest = body.partition(":")
    return TierTable(kind, {**_arguments(text, kind, rest), **_options(text, query)})


def _arguments(text: str, kind: str, rest: str) -> dict[str, object]:
    match kind:
        case "host":
            if rest:
                return {"capacity": rest}
            raise ConfigError(f"tier={text!r} has no capacity; write host:4GB or host:20%")
        case "disk":
            # A folder may contain a colon, a size does not.
            folder, _, capacity = rest.rpartition(":")
            if folder and capacity:
                return {"folder": folder, "capacity": capacity}
            raise ConfigError(f"tier={text!r} lacks its folder or its size; write disk:FOLDER:50GB")
    if rest or not kind:
        raise ConfigError(
            f"tier={text!r} is none; write host:SIZE, disk:FOLDER:SIZE, redis://..., s3://... or, for a "
            "kind that a package adds, kind?option=value&option=value"
        )
    return {}


def _options(text: str, query: str) -> dict[str, object]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(
            f"tier={text!r}: {error}; write ?name=value&name=value behind the tier"
        ) from error
    options: dict[str, object] = {}
    for name, value in pairs:
        if name in options:
            raise ConfigError(f"tier={text!r} has {name} twice; give it once")
        options[name] = value
    return options


def _written(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_secrets(name: str, value: object) -> object:
    if any(word in name for word in _SECRET_WORDS):
        return "***"
    return _PASSWORD.sub(r"\1:***@", value) if isinstance(value, str) else value
