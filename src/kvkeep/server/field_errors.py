"""What is wrong with the fields of a request: named with their values, and what would be right."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel

from kvkeep.config.nearest import nearest_hint

__all__ = ["BadFields", "bad_fields"]

_MAX_DETAILS = 5
# Of a field there may be several: each member of a union has its own.
_MAX_FAULTS = 50
_MAX_CHARACTERS = 80
_SHOULD_BE = "Input should be "


@dataclass(frozen=True, slots=True)
class BadFields:
    """What a client is told; `param` is the first of the fields, None where it is the whole request."""

    message: str
    param: str | None


@dataclass(frozen=True, slots=True)
class _Fault:
    """`place` is the path of a field; of a union's members each has a fault of its own there."""

    place: str
    text: str


def bad_fields(error: RequestValidationError, request: Request) -> BadFields:
    """The first few faults that pydantic has found in `request`."""
    faults = [_fault(one, error.body, request) for one in error.errors()[:_MAX_FAULTS]]
    texts: dict[str, list[str]] = {}
    for fault in faults:
        seen = texts.setdefault(fault.place, [])
        if fault.text not in seen:
            seen.append(fault.text)
    details = [_joined(found) for found in list(texts.values())[:_MAX_DETAILS]]
    param = next((place for place in texts if place), None)
    return BadFields("; ".join(details) or "the request is malformed", param)


def _joined(texts: Sequence[str]) -> str:
    """Faults of one place; of several alternatives the beginning is said once."""
    first, *others = texts
    begin, found, _ = first.partition(" should be ")
    same = f"{begin}{found}"
    if found and all(one.startswith(same) for one in others):
        return " or ".join([first, *(one.removeprefix(same) for one in others)])
    return ", or ".join(texts)


def _fault(one: Mapping[str, Any], body: object, request: Request) -> _Fault:
    kind, message, path = one["type"], one["msg"], _real_path(one, body)
    place = _place(path)
    name = place or "the body"
    if kind == "json_invalid":
        reason = one.get("ctx", {}).get("error", "it ends too early")
        return _Fault("", f"the body is no JSON: {reason} at character {one['loc'][-1]}")
    if kind == "missing":
        return _Fault(place, f"{name} is missing; the request needs it")
    if kind == "extra_forbidden":
        hint = nearest_hint(str(path[-1]), sorted(_known_fields(request, path[:-1])))
        return _Fault(place, f"{name} is no field of this request; {hint}")
    if kind == "value_error":
        return _Fault(place, f"{name}: {message.removeprefix('Value error, ')}")
    if not place and isinstance(one.get("input"), bytes | str):
        return _Fault(place, "the body is not read as JSON; send content-type: application/json")
    if message.startswith(_SHOULD_BE):
        return _Fault(place, f"{_named(name, one.get('input'))} {message.removeprefix('Input ')}")
    return _Fault(place, f"{name}: {message[:1].lower()}{message[1:]}")


def _named(name: str, value: object) -> str:
    """The field with its value, where that is short."""
    if isinstance(value, Mapping):
        return f"{name} is an object and"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{name} is a list and"
    text = repr(value[:_MAX_CHARACTERS] if isinstance(value, str) else value)
    return f"{name}={text:.{_MAX_CHARACTERS}}"


def _real_path(one: Mapping[str, Any], body: object) -> list[str | int]:
    """Of pydantic's path what is in the request: names of a union's members are not."""
    where, *parts = one["loc"] or ("body",)
    if where != "body":
        return parts
    path: list[str | int] = []
    value = body
    for part in parts:
        at_key = isinstance(value, Mapping) and part in value
        if at_key or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # type: ignore[index]
            path.append(part)
    if one["type"] == "missing" and parts:
        path.append(parts[-1])
    return path


def _place(path: Sequence[str | int]) -> str:
    # JSON can write what UTF-8 cannot.
    text = ".".join(map(str, path))[: 2 * _MAX_CHARACTERS]
    return text.encode("utf-8", "backslashreplace").decode()


def _known_fields(request: Request, path: Sequence[str | int]) -> set[str]:
    """The names that the request's route takes below `path`."""
    route = request.scope.get("route")
    if not isinstance(route, APIRoute):
        return set()
    fields = [*route.dependant.query_params, *route.dependant.body_params]
    known = set()
    for field in fields:
        known |= _names_below(field.field_info.annotation, path)
    return known


def _names_below(annotation: object, path: Sequence[str | int]) -> set[str]:
    models = list(_models_in(annotation))
    if not path:
        return {
            field.alias or name for model in models for name, field in model.model_fields.items()
        }
    first, *rest = path
    if isinstance(first, int):
        return _names_below(annotation, rest)
    known = set()
    for model in models:
        for name, field in model.model_fields.items():
            if first == (field.alias or name):
                known |= _names_below(field.annotation, rest)
    return known


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for one in get_args(annotation):
        yield from _models_in(one)
