"""What one request asks of the cache: who shares, who owns, what it depends on, how long it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.config.durations import parse_duration
from kvkeep.config.nearest import checked_names
from kvkeep.errors import ConfigError

__all__ = ["MAX_NAME_LENGTH", "MAX_TAGS", "CacheOptions", "TagSpan", "check_name"]

MAX_NAME_LENGTH = 512
MAX_TAGS = 64
_MAX_PRIORITY = 100
_COUNTS_FROM = ("use", "first")


def check_name(field: str, value: object) -> None:
    """Raise ConfigError unless `value` can name a session, a tag, a context or a pin."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{field}={value!r:.80} is no name; give text that is not empty")
    if len(value) > MAX_NAME_LENGTH:
        raise ConfigError(
            f"{field} has {len(value)} characters; give at most {MAX_NAME_LENGTH}, such as a digest"
        )
    if any(character < " " or "\x7f" <= character < "\xa0" for character in value):
        raise ConfigError(
            f"{field}={value!a:.80} has a control character (a line break?); leave it out"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{field}={value!a:.80} is not valid Unicode text; {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TagSpan:
    """A tag on every block from the one that holds token `start` on."""

    tag: str
    start: int = 0

    def __post_init__(self) -> None:
        check_name("tag", self.tag)
        _check_start(self.start)


@checked_names
@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """What one request asks of the cache.

    `session` owns what only it uses: closing the session forgets it. `tags` name what the prompt depends on:
    text covers the whole request, a TagSpan what follows a token; `name@version` replaces other versions of
    the name. `ttl` (seconds, "30m", "never"; 0: gone after the response; None: the default of the settings)
    counts from every "use", or with `ttl_counts_from="first"` from when a block was first computed; of
    several the longest holds. `pin` keeps the prompt's blocks until they are unpinned: under a name, or with
    True under one made from their content; of blocks that nobody uses those of the lowest `priority` (0 to
    100) go first.

    `salt` isolates: blocks are shared only between requests of equal salt. `context` names what the session
    is about now ("auto": found out), so that what only its last context used goes first. `read=False`
    recomputes everything; `write=False` leaves nothing behind for others. `exact` refuses all reuse that is
    not exact; there is no other yet.
    """

    session: str | None = None
    tags: Sequence[str | TagSpan] = ()
    ttl: float | str | None = None
    ttl_counts_from: str = "use"
    pin: bool | str = False
    priority: int = 50
    salt: str | None = None
    context: str | None = None
    read: bool = True
    write: bool = True
    exact: bool = True

    def __post_init__(self) -> None:
        if self.salt is not None and not isinstance(self.salt, str):
            raise ConfigError(f"salt={self.salt!r} is not a string; give text, or None to share")
        if not isinstance(self.pin, bool):
            check_name("pin", self.pin)
        for field in ("read", "write", "exact"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"{field}={getattr(self, field)!r} is not a bool; give True or False"
                )
        for field in ("session", "context"):
            if getattr(self, field) is not None:
                check_name(field, getattr(self, field))
        if self.context is not None and self.session is None:
            raise ConfigError(
                f"context={self.context!r} is a session's; give session as well, or leave context out"
            )
        if self.ttl is not None:
            parse_duration("ttl", self.ttl)
        if self.ttl_counts_from not in _COUNTS_FROM:
            raise ConfigError(
                f"ttl_counts_from={self.ttl_counts_from!r} is unknown; choose use or first"
            )
        _check_priority(self.priority)
        _check_tags(self.tags)

    @property
    def tag_spans(self) -> tuple[TagSpan, ...]:
        """All tags with the token from which on they hold."""
        return tuple(TagSpan(tag=tag) if isinstance(tag, str) else tag for tag in self.tags)

    @property
    def publishes(self) -> bool:
        """Whether the request leaves blocks behind that others may find."""
        return self.write and self.ttl_s != 0

    @property
    def ttl_s(self) -> float | None:
        """Seconds to live, infinite for "never"; None for the default of the settings."""
        return None if self.ttl is None else parse_duration("ttl", self.ttl)


def _check_start(start: object) -> None:
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ConfigError(f"start={start!r} is no position of a token; give 0 or more")


def _check_priority(priority: object) -> None:
    is_int = isinstance(priority, int) and not isinstance(priority, bool)
    if not is_int or not 0 <= priority <= _MAX_PRIORITY:  # type: ignore[operator]
        raise ConfigError(f"priority={priority!r} is no integer from 0 to {_MAX_PRIORITY}; give 50")


def _check_tags(tags: object) -> None:
    if isinstance(tags, str | bytes) or not isinstance(tags, Sequence):
        raise ConfigError(f"tags={tags!r:.80} is no sequence; give a list of tags, () for none")
    if len(tags) > MAX_TAGS:
        raise ConfigError(f"tags has {len(tags)} entries; give at most {MAX_TAGS}")
    for tag in tags:
        if not isinstance(tag, TagSpan):
            check_name("tags", tag)
