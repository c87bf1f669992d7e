"""How many rules for strings a JSON schema puts on one place of its documents, before a grammar is made.

The library of grammars multiplies the rules of one place with each other, in one step that no limit of its
own ends: where a schema is compiled, or later, in the engine's thread, where tokens are chosen.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from kvkeep.errors import RequestError

__all__ = ["check_string_rules"]

# A step takes about 2 us for each, and the first that goes beyond the library's limits ends its output.
_MAX_PRODUCT = 2**17
_MAX_WORK = 2**16
_FORMAT_WEIGHT = 64
# Ways a character can begin: behind ASCII, and in one of Unicode's own classes.
_UTF8_WEIGHT = 8
_CLASS_WEIGHT = 64

_Schema = Mapping[str, Any]


def check_string_rules(field: str, schema: Mapping[str, Any]) -> None:
    """Raise RequestError where patterns and formats that one string must follow at once are too many."""
    schemas = list(_mappings(schema))
    # Most schemas have so few in all that it does not matter where they meet.
    if _product(schemas) <= _MAX_PRODUCT:
        return
    if not all(map(_is_plain, schemas[1:])):
        raise RequestError(
            f"{field} refers to its parts by id, beside many patterns; refer to them as '#/...', or give "
            "fewer patterns"
        )
    _Places(field, schema).check()


@dataclass(frozen=True, slots=True)
class _Place:
    """Schemas that hold together at one place, and groups (of anyOf, oneOf) of which one branch each does."""

    schemas: tuple[_Schema, ...]
    groups: tuple[Sequence[Any], ...]

    @property
    def key(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What tells places apart; the objects live as long as the walk."""
        return tuple(sorted(map(id, self.schemas))), tuple(sorted(map(id, self.groups)))


class _Places:
    """A walk through all places of a schema's documents."""

    def __init__(self, field: str, root: _Schema) -> None:
        self._field = field
        self._root = root
        self._seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._left: list[_Place] = []
        self._id_to_values: dict[int, list[Any]] = {}
        self._num_done = 0

    def check(self) -> None:
        """Raises RequestError for a place with too many rules, and for too many places."""
        self._add((), (), [self._root])
        while self._left:
            place = self._left.pop()
            if place.groups:
                group, *others = place.groups
                for branch in group:
                    self._add(place.schemas, others, [branch])
                continue
            self._weigh(place.schemas)
            for child in self._children(place.schemas):
                self._add((), (), child)

    def _add(
        self, schemas: Sequence[_Schema], groups: Sequence[Sequence[Any]], parts: Iterable[Any]
    ) -> None:
        """The place where `parts`, schemas or lists of alternatives, hold beside what is known."""
        id_to_schema = {id(schema): schema for schema in schemas}
        open_groups = list(groups)
        left = list(parts)
        while left:
            self._count()
            part = left.pop()
            if isinstance(part, list):
                open_groups.append(part)
            elif isinstance(part, Mapping):
                id_to_schema[id(part)] = part
                left += _listed(part, "allOf")
                # Met twice, a group is a choice each time.
                open_groups += filter(None, (_listed(part, "anyOf"), _listed(part, "oneOf")))
                if isinstance(part.get("$ref"), str):
                    left.append(_referred(self._root, part["$ref"]))
        place = _Place(tuple(id_to_schema.values()), tuple(open_groups))
        if place.key not in self._seen:
            self._seen.add(place.key)
            self._left.append(place)

    def _count(self, num_more: int = 1) -> None:
        self._num_done += num_more
        if self._num_done > _MAX_WORK:
            raise RequestError(
                f"{self._field} combines its parts in more than {_MAX_WORK} ways, beside many patterns; give "
                "less of allOf, anyOf, oneOf and $ref beside each other, or fewer patterns"
            )

    def _weigh(self, schemas: Sequence[_Schema]) -> None:
        product = _product(schemas)
        num_rules = len(set(_rules(schemas)))
        if num_rules > 1 and product > _MAX_PRODUCT:
            raise RequestError(
                f"{self._field} has {num_rules} patterns and formats that one string has to follow at once, "
                f"of weight {product:.3g} (at most {_MAX_PRODUCT}); give fewer or shorter ones beside each "
                "other and in allOf, or one pattern that says the same"
            )

    def _children(self, schemas: Sequence[_Schema]) -> Iterator[list[Any]]:
        """What holds at the places right below: properties by name, others, and items."""
        others = {id(schema): self._others(schema) for schema in schemas}
        for name in {name for schema in schemas for name in _named(schema, "properties")}:
            self._count(len(schemas))
            yield [
                part
                for schema in schemas
                for part in (_named(schema, "properties").get(name), *others[id(schema)])
                if part
            ]
        yield [part for schema in schemas for part in others[id(schema)]]
        yield [
            part
            for schema in schemas
            for key in ("items", "prefixItems", "additionalItems")
            if (part := schema.get(key))
        ]

    def _others(self, schema: _Schema) -> list[Any]:
        """What may hold for a property without a name; patterns of names exclude each other."""
        values = self._id_to_values.setdefault(
            id(schema), list(_named(schema, "patternProperties").values())
        )
        return [part for part in (values, schema.get("additionalProperties")) if part]


def _mappings(root: _Schema) -> Iterator[_Schema]:
    """All objects of a document, the root first."""
    left: list[Any] = [root]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            yield part
            left += part.values()
        elif isinstance(part, list):
            left += part


def _rules(schemas: Iterable[_Schema]) -> Iterator[tuple[str, str]]:
    for schema in schemas:
        for key in ("pattern", "format"):
            if isinstance(schema.get(key), str):
                yield key, schema[key]
        names = _named(schema, "patternProperties")
        if len(names) > 1:
            # They are compared two by two, whether they exclude each other.
            yield from (("pattern", name) for name in sorted(names, key=len)[-2:])


def _product(schemas: Iterable[_Schema]) -> float:
    weights = (
        _FORMAT_WEIGHT if key == "format" else _weight(text) for key, text in set(_rules(schemas))
    )
    return math.prod(map(float, weights))


def _weight(pattern: str) -> int:
    """About the most ways in which a text of the pattern can go on."""
    return _UTF8_WEIGHT + len(pattern) // 2 + _CLASS_WEIGHT * pattern.lower().count("\\p")


def _is_plain(schema: _Schema) -> bool:
    """Whether references are found from the root on, by the way to their place."""
    reference = schema.get("$ref", "#")
    is_path = not isinstance(reference, str) or reference == "#" or reference.startswith("#/")
    return is_path and not any(isinstance(schema.get(key), str) for key in ("$id", "id"))


def _referred(root: _Schema, reference: str) -> object:
    """The part of the document a reference names; None where there is none, which the library refuses."""
    part: Any = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, Mapping):
            part = part.get(name)
        elif isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        else:
            return None
    return part


def _named(schema: _Schema, key: str) -> Mapping[str, Any]:
    found = schema.get(key)
    return found if isinstance(found, Mapping) else {}


def _listed(schema: _Schema, key: str) -> list[Any]:
    found = schema.get(key)
    return found if isinstance(found, list) else []
