"""Values of the fields of settings, from text (environment, flags) and from TOML, checked by their types."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["field_kinds", "required_fields", "value_from_text", "value_from_toml"]

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_TUPLES = (tuple[int, ...], tuple[str, ...])


def field_kinds(settings: "type[DataclassInstance]") -> Mapping[str, tuple[object, ...]]:
    """The types that each field of a settings class may have."""
    hints = get_type_hints(settings)
    return {field.name: _alternatives(hints[field.name]) for field in fields(settings)}


def required_fields(settings: "type[DataclassInstance]") -> list[str]:
    """The fields without default."""
    return [
        field.name
        for field in fields(settings)
        if field.default is MISSING and field.default_factory is MISSING
    ]


def value_from_text(field: str, text: str, kinds: tuple[object, ...]) -> object:
    """The value of a field that `text` writes: the first of `kinds` that can be read from it.

    "none" is None, "a,b" a tuple, "true", "yes", "on" and "1" are True. Raises ConfigError.

    >>> value_from_text("ttl_s", "60", (float, NoneType))
    60.0
    """
    for kind, read in _READERS.items():
        if kind in kinds:
            try:
                return read(text.strip())
            except ValueError:
                continue
    raise _problem(field, text, kinds)


def value_from_toml(field: str, value: object, kinds: tuple[object, ...]) -> object:
    """The value of a field as TOML gives it: arrays become tuples, whole numbers may stand for others.

    Raises ConfigError for what is of no type in `kinds`.
    """
    if isinstance(value, list):
        value = tuple(value)
    if _is(value, int) and int not in kinds and float in kinds:
        value = float(cast(int, value))
    if isinstance(value, str) and str not in kinds and Path in kinds:
        value = _path(value)
    if not any(_is(value, kind) for kind in kinds):
        if isinstance(value, str) and tuple[str, ...] in kinds:
            raise ConfigError(f'{field}={value!r} is no list of names; write ["{value}"]')
        raise _problem(field, value, kinds)
    return value


def _alternatives(hint: object) -> tuple[object, ...]:
    if hint == Sequence[str]:
        return (tuple[str, ...],)
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _is(value: object, kind: object) -> bool:
    if kind in _TUPLES:
        (member, _) = get_args(kind)
        return isinstance(value, tuple) and all(_is(one, member) for one in value)
    assert isinstance(kind, type)
    # A bool is an int to Python, and to nobody else.
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _bool(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(text)


def _none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in _words(text))


# In the order in which they are tried; text itself is what everything can be read as.
_READERS: dict[object, Callable[[str], Any]] = {
    NoneType: _none,
    bool: _bool,
    int: int,
    float: float,
    tuple[int, ...]: _ints,
    tuple[str, ...]: _words,
    str: str,
    Path: _path,
}
_KIND_TO_WORDS: dict[object, str] = {
    NoneType: "none",
    bool: "true or false",
    int: "whole number",
    float: "number",
    tuple[int, ...]: "list of whole numbers",
    tuple[str, ...]: "list of names",
    str: "text",
    Path: "path",
}
_KIND_TO_EXAMPLE: dict[object, str] = {
    bool: "true",
    int: "32",
    float: "0.5",
    tuple[int, ...]: "0,1",
    tuple[str, ...]: "one,two",
    str: '"2GB"',
    Path: '"/var/lib/kvkeep"',
}


def _problem(field: str, value: object, kinds: tuple[object, ...]) -> ConfigError:
    wanted = " or ".join(words for kind, words in _KIND_TO_WORDS.items() if kind in kinds)
    example = next(text for kind, text in _KIND_TO_EXAMPLE.items() if kind in kinds)
    return ConfigError(f"{field}={value!r} is no {wanted}; write something like {example}")
