"""Versioned tags, `name@version`: of each name only the newest holds."""

from collections.abc import Iterable

__all__ = ["outdated_tags", "versioned_name"]


def versioned_name(tag: str) -> str | None:
    """The name of a tag that has a version; None for others.

    >>> versioned_name("file:src/a.py@v3"), versioned_name("doc:77")
    ('file:src/a.py', None)
    """
    name, mark, version = tag.rpartition("@")
    return name if mark and name and version else None


def outdated_tags(claimed: Iterable[str], known: Iterable[str]) -> frozenset[str]:
    """Those of `known` that are another version of a name that is claimed with a version."""
    claimed = frozenset(claimed)
    names = {name for tag in claimed if (name := versioned_name(tag)) is not None}
    if not names:
        return frozenset()
    return frozenset(tag for tag in known if tag not in claimed and versioned_name(tag) in names)
