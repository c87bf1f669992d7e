"""What to say of a name that does not exist."""

from collections.abc import Collection
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from kvkeep.errors import ConfigError

__all__ = ["checked_names", "nearest_hint"]

_T = TypeVar("_T")


def checked_names(of: type[_T]) -> type[_T]:
    """Decorates a class: a keyword that it does not take is a ConfigError with the nearest name."""
    begin = of.__init__
    names = frozenset(list(signature(begin).parameters)[1:])

    @wraps(begin)
    def checked(self: object, *values: Any, **options: Any) -> None:
        if not options.keys() <= names:
            name = next(name for name in options if name not in names)
            raise ConfigError(
                f"{name}={options[name]!r:.80} is no argument of {of.__name__}; {nearest_hint(name, names)}"
            )
        begin(self, *values, **options)

    of.__init__ = checked  # type: ignore[method-assign]
    return of


def nearest_hint(name: str, known: Collection[str]) -> str:
    """The remedy for an unknown name: the nearest known one, else all of them.

    >>> nearest_hint("polcy", ["name", "policy"]), nearest_hint("x", ["name", "policy"])
    ('did you mean policy?', 'choose from name, policy')
    """
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(sorted(known))}" if known else "there are none"
