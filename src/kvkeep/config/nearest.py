"""What to say of a name that does not exist."""

from collections.abc import Collection
from difflib import get_close_matches

__all__ = ["nearest_hint"]


def nearest_hint(name: str, known: Collection[str]) -> str:
    """The remedy for an unknown name: the nearest known one, else all of them.

    >>> nearest_hint("polcy", ["name", "policy"]), nearest_hint("x", ["name", "policy"])
    ('did you mean policy?', 'choose from name, policy')
    """
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"choose from {', '.join(sorted(known))}" if known else "there are none"
