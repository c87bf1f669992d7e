"""Versioned tags, `name@version`: of each name only the newest holds."""

from collections import OrderedDict
from collections.abc import Iterable

from kvkeep.cache.lifetimes.labels import ANY_TAG
from kvkeep.spec import BlockKey

__all__ = [
    "NewestVersions",
    "outdated_tags",
    "renewed_versions",
    "versioned_name",
    "versioned_names",
]

# Names whose newest version is remembered; one that is forgotten is looked for in tiers once more.
_MOST_NAMES = 2**14


def versioned_name(tag: str) -> str | None:
    """The name of a tag that has a version; None for others.

    >>> versioned_name("file:src/a.py@v3"), versioned_name("doc:77")
    ('file:src/a.py', None)
    """
    name, mark, version = tag.rpartition("@")
    return name if mark and name and version else None


def versioned_names(tags: Iterable[str]) -> frozenset[str]:
    """The names of all tags that have a version."""
    return frozenset(name for tag in tags if (name := versioned_name(tag)) is not None)


def outdated_tags(claimed: Iterable[str], known: Iterable[str]) -> frozenset[str]:
    """Those of `known` that are, or may be, another version of a name that is claimed with a version."""
    claimed = frozenset(claimed)
    names = versioned_names(claimed)
    if not names:
        return frozenset()
    return frozenset(
        tag
        for tag in known
        if tag == ANY_TAG or (tag not in claimed and versioned_name(tag) in names)
    )


def renewed_versions(versions: frozenset[str], later: frozenset[str]) -> frozenset[str]:
    """The same tags, with the versions that came later of the names that both have.

    >>> sorted(renewed_versions(frozenset({"f@1", "g@1"}), frozenset({"f@2", "h@1"})))
    ['f@2', 'g@1']
    """
    names = versioned_names(versions)
    new = frozenset(one for one in later if versioned_name(one) in names)
    renewed = versioned_names(new)
    return new | frozenset(one for one in versions if versioned_name(one) not in renewed)


class NewestVersions:
    """Which version of each tenant's names came last, as long as no block with another one may be about."""

    def __init__(self) -> None:
        self._place_to_tags: OrderedDict[tuple[BlockKey, int, str], frozenset[str]] = OrderedDict()
        # All that is noted of a tenant is void when its number changes.
        self._numbers: dict[BlockKey, int] = {}

    def arrive(self, namespace: BlockKey, tags: Iterable[str]) -> frozenset[str]:
        """Note the versions among the tags of a request; returns those of names that had others last."""
        name_to_tags: dict[str, set[str]] = {}
        for tag in tags:
            name = versioned_name(tag)
            if name is not None:
                name_to_tags.setdefault(name, set()).add(tag)
        new: set[str] = set()
        for name, versions in name_to_tags.items():
            place = self._place(namespace, name)
            if self._place_to_tags.get(place) != frozenset(versions):
                new |= versions
                self._place_to_tags[place] = frozenset(versions)
            self._place_to_tags.move_to_end(place)
            if len(self._place_to_tags) > _MOST_NAMES:
                self._place_to_tags.popitem(last=False)
        return frozenset(new)

    def doubt(self, namespace: BlockKey, tags: Iterable[str]) -> None:
        """A block with these tags is about: of names that had other versions last nothing is noted now."""
        for tag in tags:
            if tag == ANY_TAG:
                self._numbers[namespace] = self._numbers.get(namespace, 0) + 1
            name = versioned_name(tag)
            if name is not None:
                place = self._place(namespace, name)
                noted = self._place_to_tags.get(place)
                if noted is not None and tag not in noted:
                    del self._place_to_tags[place]

    def _place(self, namespace: BlockKey, name: str) -> tuple[BlockKey, int, str]:
        return namespace, self._numbers.get(namespace, 0), name
