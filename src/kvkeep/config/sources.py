"""Settings from where people write them: flags over environment over a TOML file over defaults.

    [engine]                     KVKEEP_CAPACITY=4GB
    capacity = "4GB"             KVKEEP_TIERS="host:4GB disk:~/.cache/kvkeep:50GB"
                                 KVKEEP_CONFIG=kvkeep.toml
    [[tiers]]
    kind = "disk"
    folder = "~/.cache/kvkeep"
    capacity = "50GB"

What a later source says of the tiers replaces what an earlier one said of them. An unknown name is an error.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

from kvkeep.config.engine import EngineSettings
from kvkeep.config.fields import field_kinds, value_from_text, value_from_toml
from kvkeep.config.nearest import nearest_hint
from kvkeep.config.tier_tables import TierTable, parse_tier, parse_tiers
from kvkeep.errors import ConfigError

__all__ = ["ENVIRONMENT_PREFIX", "LoadedSettings", "Origin", "Source", "load_settings"]

ENVIRONMENT_PREFIX = "KVKEEP_"
_TIERS = "tiers"
_CONFIG = "KVKEEP_CONFIG"
# Read by parts that run before there are settings, by our own build and tests, and by the server.
_READ_ELSEWHERE = (
    "KVKEEP_ISA",
    "KVKEEP_NATIVE_LIBRARY",
    "KVKEEP_TORCH_SPEC",
    "KVKEEP_TEST_PROFILE",
    # Of the server and its clients: keys are no settings of an engine.
    "KVKEEP_API_KEYS",
    "KVKEEP_ADMIN_KEY",
    "KVKEEP_URL",
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
    """The settings of an engine, its tiers, nearest first, and where each of these values comes from."""

    engine: EngineSettings
    tiers: tuple[TierTable, ...]
    name_to_origin: Mapping[str, Origin]


@dataclass(frozen=True, slots=True)
class _Said:
    value: object
    origin: Origin


def load_settings(
    *,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> LoadedSettings:
    """Settings from a TOML file, `environment` (this process's by default) and `flags`.

    `file` defaults to what KVKEEP_CONFIG names. `flags` are those that were given: fields of EngineSettings
    by name, and "tiers", a sequence of texts. Raises ConfigError, naming the place of what cannot be.
    """
    environment = os.environ if environment is None else environment
    file = file or environment.get(_CONFIG) or None
    said: dict[str, _Said] = {}
    # Each source overrules those before it.
    if file is not None:
        said.update(_from_file(Path(file).expanduser()))
    said.update(_from_environment(environment))
    said.update(_from_flags(flags or {}))
    tiers = said.pop(_TIERS, _Said((), Origin(Source.DEFAULT)))
    assert isinstance(tiers.value, tuple)
    names = [field.name for field in fields(EngineSettings)]
    origins = {
        name: said[name].origin if name in said else Origin(Source.DEFAULT) for name in names
    }
    return LoadedSettings(
        engine=_engine(said),
        tiers=tiers.value,
        name_to_origin={**origins, _TIERS: tiers.origin},
    )


def _engine(said: Mapping[str, _Said]) -> EngineSettings:
    try:
        return EngineSettings.of({name: one.value for name, one in said.items()})
    except ConfigError as error:
        # Messages begin with the field: from there to the place where somebody wrote it.
        name = str(error).partition("=")[0]
        if name not in said:
            raise
        raise ConfigError(f"{error} (from {said[name].origin})") from error


def _from_file(path: Path) -> dict[str, _Said]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config={str(path)!r} cannot be read ({error.strerror}); give the path of a TOML file"
        ) from error
    except ValueError as error:
        raise ConfigError(f"config={str(path)!r} is no TOML: {error}; correct that line") from error
    _refuse_unknown(document, ("engine", _TIERS), f"in {path}")
    engine, tables = document.get("engine", {}), document.get(_TIERS, [])
    if not isinstance(engine, dict):
        raise ConfigError(
            f"engine={engine!r} in {path} is no table; write [engine] above its fields"
        )
    kinds = field_kinds(EngineSettings)
    _refuse_unknown(engine, kinds, f"in [engine] of {path}")
    said = {}
    for name, value in engine.items():
        origin = Origin(Source.FILE, f"engine.{name} in {path}")
        said[name] = _Said(_checked(name, value, kinds[name], origin), origin)
    if _TIERS in document:
        said[_TIERS] = _Said(_tables(tables, path), Origin(Source.FILE, f"{_TIERS} in {path}"))
    return said


def _checked(name: str, value: object, kinds: tuple[object, ...], origin: Origin) -> object:
    try:
        return value_from_toml(name, value, kinds)
    except ConfigError as error:
        raise ConfigError(f"{error} (from {origin})") from error


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
    kinds = field_kinds(EngineSettings)
    variable_to_field = {ENVIRONMENT_PREFIX + name.upper(): name for name in (*kinds, _TIERS)}
    ours = {name: text for name, text in environment.items() if name.startswith(ENVIRONMENT_PREFIX)}
    for name in (_CONFIG, *_READ_ELSEWHERE):
        ours.pop(name, None)
    _refuse_unknown(ours, (*variable_to_field, _CONFIG, *_READ_ELSEWHERE), "in the environment")
    said = {}
    for variable, text in ours.items():
        name = variable_to_field[variable]
        origin = Origin(Source.ENVIRONMENT, variable)
        try:
            value = (
                parse_tiers(text) if name == _TIERS else value_from_text(name, text, kinds[name])
            )
        except ConfigError as error:
            raise ConfigError(f"{error} (from {origin})") from error
        said[name] = _Said(value, origin)
    return said


def _from_flags(flags: Mapping[str, object]) -> dict[str, _Said]:
    _refuse_unknown(flags, (*field_kinds(EngineSettings), _TIERS), "among the flags")
    said = {}
    for name, value in flags.items():
        if name == _TIERS:
            assert isinstance(value, Sequence), "one text per --tier"
            tiers = tuple(parse_tier(text) for text in value)
            said[name] = _Said(tiers, Origin(Source.FLAG, "--tier"))
        else:
            said[name] = _Said(value, Origin(Source.FLAG, f"--{name.replace('_', '-')}"))
    return said


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"{name} {where} is no setting; {nearest_hint(name, known)}")
