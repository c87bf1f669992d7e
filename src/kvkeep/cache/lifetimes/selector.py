"""Which blocks are meant: by tag, session, tenant, key, age or use."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import inf

from kvkeep.cache.lifetimes.labels import Labels
from kvkeep.cache.lifetimes.register import Register
from kvkeep.cache.lifetimes.tombstones import Tombstone
from kvkeep.cache.lifetimes.versions import outdated_tags, renewed_versions
from kvkeep.errors import ConfigError
from kvkeep.spec import BlockKey

__all__ = ["Match", "Query", "Selector", "match"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """What a purge means. A block has to fit every field that is given; of one field's values any will do.

    `tags`: blocks with such a tag. `sessions`: blocks that none but these sessions use. `salts`: blocks of
    these tenants (None: of those without). `keys`: these blocks. `older_than_s`: computed so long ago;
    `unused_for_s`: not used for so long. `everything` has to be said where nothing else is. Pinned blocks are
    meant with `include_pinned` only. `tiers` ("device" is one) limits where they are forgotten.

    Raises ConfigError for a selector that means nothing, or everything by mistake.
    """

    tags: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    salts: tuple[str | None, ...] = ()
    keys: tuple[BlockKey, ...] | None = None
    older_than_s: float | None = None
    unused_for_s: float | None = None
    everything: bool = False
    include_pinned: bool = False
    tiers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("older_than_s", "unused_for_s"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < inf:
                raise ConfigError(
                    f"{field}={value!r} is no length of time; give seconds, 0 or more"
                )
        for field in ("tags", "sessions", "salts", "tiers"):
            if isinstance(getattr(self, field), str):
                raise ConfigError(f"{field}={getattr(self, field)!r} is text; give a tuple of such")
        is_narrow = bool(self.tags or self.sessions or self.salts) or any(
            one is not None for one in (self.keys, self.older_than_s, self.unused_for_s)
        )
        if self.everything and is_narrow:
            raise ConfigError("everything=True leaves nothing to choose; give it alone")
        if not self.everything and not is_narrow:
            raise ConfigError(
                "a purge names no block; give tags, sessions, salts, keys or an age, or everything=True"
            )

    def resolve(self, namespace_of: Callable[[str | None], BlockKey], now_s: float) -> "Query":
        """The same in terms of keys and points in time."""
        return Query(
            tags=frozenset(self.tags),
            sessions=frozenset(self.sessions),
            namespaces=frozenset(map(namespace_of, self.salts)) if self.salts else None,
            keys=None if self.keys is None else frozenset(self.keys),
            created_before=None if self.older_than_s is None else now_s - self.older_than_s,
            used_before=None if self.unused_for_s is None else now_s - self.unused_for_s,
            include_pinned=self.include_pinned,
            tiers=self.tiers,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A selector at a point in time, so that it means the same blocks when a crash interrupted it.

    None and empty sets leave all. `versions` are tags with a version: blocks with another version of one of
    their names are meant.
    """

    tags: frozenset[str] = frozenset()
    sessions: frozenset[str] = frozenset()
    namespaces: frozenset[BlockKey] | None = None
    keys: frozenset[BlockKey] | None = None
    created_before: float | None = None
    used_before: float | None = None
    include_pinned: bool = False
    tiers: tuple[str, ...] | None = None
    versions: frozenset[str] = frozenset()

    @property
    def means_tenants(self) -> bool:
        """Whether all of some tenants is meant, or all there is; pins aside."""
        whole = Query(
            namespaces=self.namespaces, include_pinned=self.include_pinned, tiers=self.tiers
        )
        return self == whole

    def renewed(self, later: "Query") -> "Query":
        """The same once `later` has begun: of names whose versions both bring only those of `later` hold."""
        if not self.versions or not later.versions or self.namespaces != later.namespaces:
            return self
        return replace(self, versions=renewed_versions(self.versions, later.versions))

    def fits(self, labels: Labels) -> bool:
        """Whether blocks of these labels are meant, as far as labels tell; pinned ones are."""
        return (
            (not self.tags or labels.bears(self.tags))
            and (not self.sessions or self._is_of_sessions(labels))
            and (not self.versions or bool(outdated_tags(self.versions, labels.tags)))
            and (self.namespaces is None or labels.namespace in self.namespaces)
            and (self.created_before is None or labels.created_at <= self.created_before)
        )

    def means(self, key: BlockKey, labels: Labels) -> bool:
        """Whether a block of these labels was meant, as far as labels tell."""
        is_free = self.include_pinned or not labels.pins
        return is_free and (self.keys is None or key in self.keys) and self.fits(labels)

    def _is_of_sessions(self, labels: Labels) -> bool:
        return bool(labels.sessions) and not labels.is_shared and labels.sessions <= self.sessions

    def spares(self, labels: Labels) -> bool:
        """Whether blocks of these labels would be meant were they not pinned."""
        return bool(labels.pins) and not self.include_pinned and self.fits(labels)

    def tombstone(self, register: Register, now_s: float) -> Tombstone:
        """What of the register is meant at `now_s`; what has expired by then is gone already."""

        def fits(labels: Labels) -> bool:
            is_free = self.include_pinned or not labels.pins
            return is_free and labels.ends_at > now_s and self.fits(labels)

        is_whole = self.keys is None and self.used_before is None
        return Tombstone(fits, None if is_whole else partial(self.fits_key, register))

    def fits_key(self, register: Register, key: BlockKey) -> bool:
        """Whether a block is meant, as far as its key and its last use tell."""
        if self.keys is not None and key not in self.keys:
            return False
        used_at = register.used_at(key)
        return self.used_before is None or used_at is None or used_at <= self.used_before

    def candidates(self, register: Register) -> Iterator[tuple[Labels, Collection[BlockKey]]]:
        """All blocks that may be meant, of those that are known now, by labels; each comes once."""
        if self.tags:
            return register.tagged(*self.tags)
        if self.versions:
            return register.of_versions(self.namespaces, *self.versions)
        if self.sessions:
            return register.of_session(
                *(one for one in register.sessions if one.name in self.sessions)
            )
        if self.namespaces is not None:
            return chain.from_iterable([register.of_namespace(one) for one in self.namespaces])
        if self.keys is not None:
            return register.of_keys(self.keys)
        return register.all()


@dataclass(frozen=True, slots=True)
class Match:
    """Blocks that a query means, and how many more it would mean were they not pinned."""

    keys: frozenset[BlockKey]
    num_pinned: int


def match(query: Query, register: Register, now_s: float) -> Match:
    """The blocks of the register that a query means; what has expired by now is gone already."""
    tombstone = query.tombstone(register, now_s)
    found: set[BlockKey] = set()
    pinned: set[BlockKey] = set()
    for labels, keys in query.candidates(register):
        if tombstone.fits(labels):
            found.update(filter(tombstone.fits_key, keys) if tombstone.fits_key else keys)
        elif query.spares(labels):
            pinned.update(filter(tombstone.fits_key, keys) if tombstone.fits_key else keys)
    return Match(frozenset(found), len(pinned))
