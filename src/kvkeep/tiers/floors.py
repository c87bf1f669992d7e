"""From what users ask for to the floors of a stack: tables to settings, settings to tiers with names."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

from kvkeep.config.extensions import ExtensionGroup, find_extension
from kvkeep.config.fields import field_kinds, required_fields, value_from_text, value_from_toml
from kvkeep.config.nearest import nearest_hint
from kvkeep.config.tier_tables import TierTable
from kvkeep.errors import ConfigError
from kvkeep.tiers.base import Occasion
from kvkeep.tiers.object_store import OBJECT_URL_OPTIONS
from kvkeep.tiers.resp_url import RESP_URL_OPTIONS
from kvkeep.tiers.settings import OBJECT_SCHEMES, REMOTE_SCHEMES, Disk, Host, Remote, TierSettings
from kvkeep.tiers.stack import Floor

__all__ = ["open_floors", "tier_names", "tier_settings"]

_KIND_TO_SETTINGS: Mapping[str, type[Host | Disk | Remote]] = {
    "host": Host,
    "disk": Disk,
    "remote": Remote,
}


def tier_settings(table: TierTable) -> TierSettings:
    """The settings that a table stands for, of ours or of an installed package.

    Text becomes what the fields are; options of Remote may stand in its address, behind "?". Raises
    ConfigError, with the table but without its secrets, for kinds, options and values that there are not.
    """
    kind = "remote" if table.kind in REMOTE_SCHEMES else table.kind
    try:
        settings = _KIND_TO_SETTINGS.get(kind) or find_extension(
            ExtensionGroup.TIERS, kind, built_in=[*_KIND_TO_SETTINGS, *REMOTE_SCHEMES]
        )
        options = _options_in_url(table.options) if settings is Remote else dict(table.options)
        return _make(settings, options)
    except ConfigError as error:
        raise ConfigError(f"{error} (in tier {table})") from error


def tier_names(settings: Sequence[TierSettings]) -> list[str]:
    """A name for each tier: its own, else its kind, with a number from the second of a kind on.

    Raises ConfigError where two have been given the same.
    """
    given = [one.name for one in settings if one.name is not None]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(
                f"name={name!r} is given to {given.count(name)} tiers; give each its own"
            )
    taken, names = set(given), []
    for one in settings:
        name = one.name or _free_name(one.kind, taken)
        taken.add(name)
        names.append(name)
    return names


def open_floors(settings: Sequence[TierSettings]) -> tuple[Floor, ...]:
    """The floors of a TierStack, nearest first; when one cannot be opened, those before it are closed."""
    floors = []
    with ExitStack() as opened:
        for one, name in zip(settings, tier_names(settings), strict=True):
            tier = opened.enter_context(one.open(name))
            floors.append(Floor(tier, frozenset(Occasion(occasion) for occasion in one.write_on)))
        opened.pop_all()
    return tuple(floors)


def _free_name(kind: str, taken: Collection[str]) -> str:
    name, number = kind, 1
    while name in taken:
        number += 1
        name = f"{kind}-{number}"
    return name


def _make(settings: object, options: Mapping[str, object]) -> TierSettings:
    if isinstance(settings, type) and is_dataclass(settings):
        kinds = field_kinds(settings)
        for name in options:
            if name not in kinds:
                raise ConfigError(f"{name} is no option of the tier; {nearest_hint(name, kinds)}")
        for name in required_fields(settings):
            if name not in options:
                raise ConfigError(f"{name} is missing; give it")
        options = {name: _typed(name, value, kinds[name]) for name, value in options.items()}
    if not callable(settings):
        raise ConfigError(
            f"tier={settings!r} is no class of settings; update the package it is from"
        )
    try:
        return cast(TierSettings, settings(**options))
    except TypeError as error:
        raise ConfigError(f"tier options do not fit: {error}; correct them") from error


def _typed(name: str, value: object, kinds: tuple[object, ...]) -> object:
    if isinstance(value, str):
        return value_from_text(name, value, kinds)
    return value_from_toml(name, value, kinds)


def _options_in_url(options: Mapping[str, object]) -> dict[str, Any]:
    """The options with those in the address taken out of it that are not its own."""
    url = options.get("url")
    if not isinstance(url, str) or "?" not in url:
        return dict(options)
    place, _, query = url.partition("?")
    kinds = field_kinds(Remote)
    own = OBJECT_URL_OPTIONS if place.partition("://")[0] in OBJECT_SCHEMES else RESP_URL_OPTIONS
    taken: dict[str, object] = {}
    left: list[tuple[str, str]] = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in own:
            left.append((name, value))
        elif name not in kinds or name == "url":
            raise ConfigError(
                f"{name} is no option of an address; {nearest_hint(name, [*kinds, *own])}"
            )
        elif name in taken or name in options:
            raise ConfigError(f"{name} is there twice; give it once")
        else:
            taken[name] = value
    url = f"{place}?{urlencode(left, safe='/:')}" if left else place
    return {**options, **taken, "url": url}
