"""How many patterns may have to hold for one string of a JSON schema's documents."""

from typing import Any

import pytest

from kvkeep.errors import RequestError
from kvkeep.server.string_rules import check_string_rules

_MANY = 40


def _pattern(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f".*a.{{{number}}}b.*"}


_PATTERNS = [_pattern(number) for number in range(1, _MANY)]
_UNION = {"anyOf": _PATTERNS}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": _PATTERNS},
        {"allOf": [{"properties": {"a": {"properties": {"b": one}}}} for one in _PATTERNS]},
        {"allOf": [{"items": one} for one in _PATTERNS]},
        {"allOf": [{"prefixItems": [one]} for one in _PATTERNS]},
        {"allOf": [{"additionalProperties": one} for one in _PATTERNS]},
        {"allOf": [{"patternProperties": {"^x": one}} for one in _PATTERNS]},
        {"allOf": [{"anyOf": [one, {"type": "null"}]} for one in _PATTERNS]},
        {"$defs": {"any": _UNION}, "allOf": [{"$ref": "#/$defs/any"}] * 30},
        {
            "$defs": {
                "0": _PATTERNS[0],
                **{
                    str(number): {**_PATTERNS[number], "$ref": f"#/$defs/{number - 1}"}
                    for number in range(1, _MANY - 1)
                },
            },
            "$ref": f"#/$defs/{_MANY - 2}",
        },
    ],
)
def test_many_patterns_for_one_string_are_refused(schema: dict[str, Any]) -> None:
    """Wherever they come together: beside each other, below, by reference, or as alternatives."""
    with pytest.raises(
        RequestError, match=r"^tools has \d+ patterns and formats that one string has"
    ):
        check_string_rules("tools", schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{number}": one for number, one in enumerate(_PATTERNS)}},
        {"anyOf": [{"properties": {"kind": one}} for one in _PATTERNS]},
        {"allOf": [{"properties": {f"p{number}": one}} for number, one in enumerate(_PATTERNS)]},
        {"$defs": {"any": _UNION}, "items": {"$ref": "#/$defs/any"}},
        {"properties": {"next": {"$ref": "#"}, "any": _UNION}},
        {"type": "string", "pattern": "(" + "|".join(["[ab]x"] * 4000) + ")", "maxLength": 9},
        {"allOf": _PATTERNS[:2], "format": "date"},
        {"properties": {"pattern": {"type": "string"}, "format": _UNION}},
    ],
)
def test_patterns_at_different_places_are_as_many_as_they_like(schema: dict[str, Any]) -> None:
    """They never meet; nor is one pattern too long."""
    check_string_rules("tools", schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"$ref": "#"}], "anyOf": _PATTERNS},
        {
            "$defs": {
                "0": _UNION,
                **{
                    str(number): {"allOf": [{"$ref": f"#/$defs/{number - 1}"}] * 2}
                    for number in range(1, 30)
                },
            },
            "$ref": "#/$defs/29",
        },
    ],
)
def test_too_many_combinations_are_refused(schema: dict[str, Any]) -> None:
    """Looking for them comes to an end."""
    with pytest.raises(RequestError, match=r"^tools combines its parts in more than"):
        check_string_rules("tools", schema)


def test_references_by_id_are_refused_beside_many_patterns() -> None:
    """What they mean is not looked up here; beside few patterns they do no harm."""
    few = {"$defs": {"a": {"$id": "https://a.example/b"}}, "items": _PATTERNS[0]}
    check_string_rules("tools", few)

    with pytest.raises(RequestError, match=r"refer to them as '#/...'"):
        check_string_rules("tools", {**few, "anyOf": _PATTERNS})
