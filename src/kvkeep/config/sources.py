"""Settings from where people write them: flags over environment over a TOML file over defaults.

    [engine]                     KVKEEP_CAPACITY=4GB
    capacity = "4GB"             KVKEEP_TIERS="host:4GB disk:~/.cache/kvkeep:50GB"
                                 KVKEEP_CONFIG=kvkeep.toml
    [[tiers]]                    [server]                                 KVKEEP_API_KEYS="long-key another"
    kind = "disk"                port = 8010
    folder = "~/.cache/kvkeep"   request_timeout_s = "10m"
    capacity = "50GB"

                                 [[warm]]         see kvkeep.config.warm

What a later source says of the tiers replaces what an earlier one said of them. An unknown name is an error.
"""

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from kvkeep.config.engine import EngineSettings
from kvkeep.config.fields import field_kinds, value_from_text, value_from_toml
from kvkeep.config.nearest import nearest_hint
from kvkeep.config.server import server_kinds, server_value
from kvkeep.config.tier_tables import TierTable, parse_tier, parse_tiers
from kvkeep.config.warm import WarmTable, parse_warm
from kvkeep.errors import ConfigError

__all__ = ["ENVIRONMENT_PREFIX", "LoadedSettings", "Origin", "Source", "load_settings"]

ENVIRONMENT_PREFIX = "KVKEEP_"
_TIERS, _WARM = "tiers", "warm"
_ENGINE, _SERVER = "engine", "server"
_CONFIG = "KVKEEP_CONFIG"
# Read by parts that run before there are settings, by our own build and tests, and by clients of a server.
_READ_ELSEWHERE = (
    "KVKEEP_ISA",
    "KVKEEP_NATIVE_LIBRARY",
    "KVKEEP_TORCH_SPEC",
    "KVKEEP_TEST_PROFILE",
    "KVKEEP_URL",
)
# What Kubernetes tells every container of a service whose name begins with kvkeep.
_SERVICE_LINK = re.compile(
    r"KVKEEP_(\w+_)?(SERVICE_(HOST|PORT\w*)=|PORT_\d+_(TCP|UDP|SCTP)\w*=|PORT=(tcp|udp|sctp)://)"
)


class Source(StrEnum):
    """Who may say what a setting is; each overrules those before it."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from; `place` is the file and key, the variable or the flag, "" for a default."""

    source: Source
    place: str = ""

    def __str__(self) -> str:
        return self.place or str(self.source)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSettings:
    """The settings of an engine, its tiers, nearest first, and where each of these values comes from.

    `server` has the fields of ServerSettings that somebody gave, `warm` what it is to compute at its start.
    """

    engine: EngineSettings
    tiers: tuple[TierTable, ...]
    server: Mapping[str, object]
    warm: tuple[WarmTable, ...]
    name_to_origin: Mapping[str, Origin]

    def blamed(self, error: ConfigError) -> ConfigError:
        """The error with the place where the value was written, where that is known."""
        # Messages begin with the field: from there to the place where somebody wrote it.
        origin = self.name_to_origin.get(str(error).partition("=")[0])
        if origin is None or origin.source is Source.DEFAULT:
            return error
        return ConfigError(f"{error} (from {origin})")


@dataclass(frozen=True, slots=True)
class _Said:
    value: object
    origin: Origin


def load_settings(
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    name_to_flag: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Settings from a TOML file, `environment` (this process's by default) and `flags`.

    `file` defaults to what KVKEEP_CONFIG names. `flags` are those that were given: fields of EngineSettings
    and ServerSettings by name, and "tiers", a sequence of texts; `name_to_flag` says how they are written,
    where not as the field. Raises ConfigError, naming the place of what cannot be.
    """
    environment = os.environ if environment is None else environment
    file = file or environment.get(_CONFIG) or None
    said: dict[str, _Said] = {}
    # Each source overrules those before it.
    if file is not None:
        said.update(_from_file(Path(file).expanduser()))
    said.update(_from_environment(environment))
    said.update(_from_flags(flags or {}, name_to_flag or {}))
    default = Origin(Source.DEFAULT)
    tiers, warm = (said.pop(name, _Said((), default)) for name in (_TIERS, _WARM))
    assert isinstance(tiers.value, tuple)
    assert isinstance(warm.value, tuple)
    server = {name: said.pop(name) for name in server_kinds() if name in said}
    origins = dict.fromkeys((*field_kinds(EngineSettings), *server_kinds()), default)
    origins |= {name: one.origin for name, one in (said | server).items()}
    loaded = LoadedSettings(
        engine=EngineSettings(),
        tiers=tiers.value,
        server={name: one.value for name, one in server.items()},
        warm=warm.value,
        name_to_origin={**origins, _TIERS: tiers.origin, _WARM: warm.origin},
    )
    try:
        engine = EngineSettings.of({name: one.value for name, one in said.items()})
    except ConfigError as error:
        raise loaded.blamed(error) from error
    return replace(loaded, engine=engine)


def _from_file(path: Path) -> dict[str, _Said]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config={str(path)!r} cannot be read ({error.strerror}); give the path of a TOML file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"config={str(path)!r} is no TOML: {error}; correct that line") from error
    _refuse_unknown(document, (_ENGINE, _SERVER, _TIERS, _WARM), f"in {path}")
    said = {}
    for table, kinds in ((_ENGINE, field_kinds(EngineSettings)), (_SERVER, server_kinds())):
        values = document.get(table, {})
        if not isinstance(values, dict):
            raise ConfigError(
                f"{table}={values!r} in {path} is no table; write [{table}] above its fields"
            )
        _refuse_unknown(values, kinds, f"in [{table}] of {path}")
        for name, value in values.items():
            said[name] = _said(name, value, Origin(Source.FILE, f"{table}.{name} in {path}"))
    if _TIERS in document:
        tables = _tables(document[_TIERS], path)
        said[_TIERS] = _Said(tables, Origin(Source.FILE, f"{_TIERS} in {path}"))
    if _WARM in document:
        warm = parse_warm(document[_WARM], path)
        said[_WARM] = _Said(warm, Origin(Source.FILE, f"{_WARM} in {path}"))
    return said


def _said(name: str, value: object, origin: Origin) -> _Said:
    """A value of a file, or text of a variable or a flag, as its field has it."""
    is_text = origin.source is not Source.FILE
    engine, server = field_kinds(EngineSettings), server_kinds()
    try:
        if name in server:
            value = server_value(name, value, server[name], is_text=is_text)
        elif is_text:
            assert isinstance(value, str)
            value = value_from_text(name, value, engine[name])
        else:
            value = value_from_toml(name, value, engine[name])
    except ConfigError as error:
        raise ConfigError(f"{error} (from {origin})") from error
    return _Said(value, origin)


def _tables(tables: object, path: Path) -> tuple[TierTable, ...]:
    if not isinstance(tables, list):
        raise ConfigError(f"{_TIERS} in {path} is no list; write [[{_TIERS}]] above every tier")
    found = []
    for table in tables:
        if isinstance(table, str):
            found.append(parse_tier(table))
            continue
        kind = table.get("kind") if isinstance(table, dict) else None
        if not isinstance(kind, str):
            raise ConfigError(
                f'a tier of {path} has kind={kind!r}; write kind = "host", "disk" or "remote"'
            )
        found.append(TierTable(kind, {name: table[name] for name in table if name != "kind"}))
    return tuple(found)


def _from_environment(environment: Mapping[str, str]) -> dict[str, _Said]:
    fields = (*field_kinds(EngineSettings), *server_kinds(), _TIERS)
    variable_to_field = {ENVIRONMENT_PREFIX + name.upper(): name for name in fields}
    ours = {
        name: text
        for name, text in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and not _SERVICE_LINK.match(f"{name}={text}")
    }
    for name in (_CONFIG, *_READ_ELSEWHERE):
        ours.pop(name, None)
    _refuse_unknown(ours, (*variable_to_field, _CONFIG, *_READ_ELSEWHERE), "in the environment")
    said = {}
    for variable, text in ours.items():
        name, origin = variable_to_field[variable], Origin(Source.ENVIRONMENT, variable)
        if name != _TIERS:
            said[name] = _said(name, text, origin)
            continue
        try:
            said[name] = _Said(parse_tiers(text), origin)
        except ConfigError as error:
            raise ConfigError(f"{error} (from {origin})") from error
    return said


def _from_flags(flags: Mapping[str, object], name_to_flag: Mapping[str, str]) -> dict[str, _Said]:
    server = server_kinds()
    _refuse_unknown(flags, (*field_kinds(EngineSettings), *server, _TIERS), "among the flags")
    said = {}
    for name, value in flags.items():
        place = name_to_flag.get(name, f"--{name.replace('_', '-')}")
        origin = Origin(Source.FLAG, "--tier" if name == _TIERS else place)
        if name == _TIERS:
            assert isinstance(value, Sequence), "one text per --tier"
            said[name] = _Said(tuple(parse_tier(text) for text in value), origin)
        elif name in server:
            said[name] = _said(name, value, origin)
        else:
            said[name] = _Said(value, origin)
    return said


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{name} {where} is no setting; {nearest_hint(name, known)}")
