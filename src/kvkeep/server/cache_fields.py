"""What a request says of the cache, in the words of any client: `kv_cache`, and the names others gave it.

The object `kv_cache` comes first; a field it leaves out may come from an alias. What is not understood is
never refused: it becomes a warning, which the response's header X-KV-Warnings carries.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from kvkeep.config import CacheOptions, TagSpan
from kvkeep.config.durations import parse_duration
from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError, RequestError
from kvkeep.server.block_fields import shown
from kvkeep.server.body_limits import FewEntries

__all__ = [
    "CacheFields",
    "CachedRequest",
    "KVCacheObject",
    "PlacedTag",
    "Warnings",
    "read_cache_fields",
    "without_cache_fields",
]

SESSION_HEADER = "x-session-id"
WARNINGS_HEADER = "X-KV-Warnings"
_MAX_HEADER_LENGTH = 1024
# More names would not go into the header.
_MAX_UNKNOWN = 64
# What a message or a content part may say of the cache; no template shall see it.
_PART_FIELDS = ("kv_cache", "cache_control", "prompt_cache_breakpoint")
# The lifetime of a mark without one, as the protocol that invented it has it.
_EPHEMERAL_TTL = "5m"
_GEMINI_PREFIX = "cachedContents/"


class KVCacheObject(BaseModel):
    """The object `kv_cache` of a request; see CacheOptions for the meaning of its fields."""

    model_config = ConfigDict(extra="allow", strict=True)

    session: str | None = None
    context: str | None = None
    tags: FewEntries[str] | None = None
    salt: str | None = None
    ttl: int | float | str | None = Field(None, description='seconds, "30m", "1h", "never" or -1')
    ttl_counts_from: str | None = None
    pin: bool | None = None
    priority: int | None = None
    read: bool | None = None
    write: bool | None = None
    exact: bool | None = None
    explain: bool | None = Field(None, description="report what was reused, and why not more")


class CachedRequest(BaseModel):
    """The fields of a request body that speak of the cache, on every route that computes a prompt."""

    model_config = ConfigDict(extra="allow", strict=True)

    kv_cache: KVCacheObject | None = None
    session_id: str | None = Field(None, description="kv_cache.session")
    cache_salt: str | None = Field(None, description="kv_cache.salt")
    cached_content: str | None = Field(None, description="kv_cache.context")
    cache_prompt: bool | None = Field(None, description="false: kv_cache.read and write are off")
    cache_control: dict[str, Any] | None = Field(None, description="kv_cache.ttl, by default 5m")
    prompt_cache_key: str | None = Field(None, description="a hint for routers; isolates nothing")
    prompt_cache_options: dict[str, Any] | None = Field(None, description="its ttl: kv_cache.ttl")
    prompt_cache_retention: str | None = Field(None, description='"24h": kv_cache.ttl')


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedTag:
    """A tag of one message, or of one of its content parts, both counted from 0."""

    tag: str
    message: int
    part: int | None = None


class Warnings:
    """What of a request was not followed, in the order in which it was read."""

    def __init__(self) -> None:
        self._texts: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Note it once."""
        self._texts[text] = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All that was noted."""
        return tuple(self._texts)

    def headers(self) -> dict[str, str]:
        """The header for the response; none where there is nothing to say."""
        if not self._texts:
            return {}
        # A client chooses what is quoted here, and a header has one line of ASCII.
        line = "; ".join(text.encode("unicode_escape").decode("ascii") for text in self._texts)
        if len(line) > _MAX_HEADER_LENGTH:
            line = line[: _MAX_HEADER_LENGTH - 3] + "..."
        return {WARNINGS_HEADER: line}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFields:
    """What a request asks of the cache before its prompt has tokens.

    `options.salt` is the client's own, which the server mixes with the tenant's; `options.tags` are those of
    the whole request, `placed_tags` those of its parts.
    """

    options: CacheOptions
    warnings: Warnings
    explain: bool = False
    placed_tags: tuple[PlacedTag, ...] = ()

    def options_for(
        self,
        *,
        salt: str | None,
        message_starts: Sequence[int] = (),
        part_starts: Sequence[Sequence[int]] = (),
    ) -> CacheOptions:
        """The options with the salt to use, and every placed tag at the token where its part begins.

        `message_starts[i]` is the first token of message i, `part_starts[i][j]` that of its part j. Where a
        part's place is not known its message's is taken, else the start: a tag never covers too little.
        """
        spans = [
            TagSpan(tag=placed.tag, start=_start(placed, message_starts, part_starts))
            for placed in self.placed_tags
        ]
        return replace(self.options, salt=salt, tags=(*self.options.tags, *spans))


def read_cache_fields(
    request: CachedRequest,
    headers: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]] = (),
    *,
    marked: Sequence[Mapping[str, Any]] = (),
) -> CacheFields:
    """What `request`, its headers (names in lower case) and its messages ask of the cache.

    `marked` are other objects that may bear `cache_control`, such as tools. Fields of the request that its
    class does not know become warnings. Raises RequestError for a field with a value it cannot have.
    """
    reading = _Reading()
    explain = _read_object(reading, request.kv_cache)
    _read_aliases(reading, request, headers)
    _read_marks(reading, [request.cache_control, *_marks(messages), *_marks(marked)])
    placed = tuple(_placed_tags(messages, reading.warnings))
    for name in islice(request.model_extra or {}, _MAX_UNKNOWN):
        reading.warnings.add(f"{name!r:.80} is unknown and ignored")
    return CacheFields(
        options=reading.options(),
        warnings=reading.warnings,
        explain=explain,
        placed_tags=placed,
    )


def without_cache_fields(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages as a chat template may see them."""
    return [_bare(message) for message in messages]


class _Reading:
    """Fields of CacheOptions as they are found; of two sources the first holds."""

    def __init__(self) -> None:
        self.warnings = Warnings()
        self._values: dict[str, Any] = {}
        self._sources: dict[str, str] = {}

    def offer(self, field: str, value: object, source: str) -> None:
        """Take `value` for a field that has none yet."""
        if value is None:
            return
        if field not in self._values:
            self._values[field], self._sources[field] = value, source
        elif self._values[field] != value:
            self.warnings.add(f"{source} is ignored: {self._sources[field]} says otherwise")

    def has(self, field: str) -> bool:
        """Whether the field has a value."""
        return field in self._values

    def options(self) -> CacheOptions:
        """The options, with errors that name the field as the client wrote it."""
        try:
            return CacheOptions(**self._values)
        except ConfigError as error:
            message = str(error)
            field = message.partition("=")[0].partition(" ")[0]
            source = self._sources.get(field, field)
            raise RequestError(source + message.removeprefix(field)) from error


def _read_object(reading: _Reading, found: KVCacheObject | None) -> bool:
    """Take the fields of `kv_cache`; returns whether to explain."""
    if found is None:
        return False
    for field in KVCacheObject.model_fields:
        value = getattr(found, field)
        if field == "ttl":
            value = _ttl(value)
        if field != "explain":
            reading.offer(field, value, f"kv_cache.{field}")
    for name in islice(found.model_extra or {}, _MAX_UNKNOWN):
        hint = nearest_hint(name, KVCacheObject.model_fields)
        reading.warnings.add(f"kv_cache.{name:.80} is unknown and ignored; {hint}")
    return bool(found.explain)


def _read_aliases(reading: _Reading, request: CachedRequest, headers: Mapping[str, str]) -> None:
    reading.offer("session", request.session_id, "session_id")
    reading.offer("session", headers.get(SESSION_HEADER) or None, SESSION_HEADER)
    reading.offer("salt", request.cache_salt, "cache_salt")
    if request.cached_content is not None:
        if reading.has("session"):
            context = request.cached_content.removeprefix(_GEMINI_PREFIX)
            reading.offer("context", context, "cached_content")
        else:
            reading.warnings.add("cached_content is ignored: a context needs a session")
    if request.cache_prompt is False:
        reading.offer("read", False, "cache_prompt")  # noqa: FBT003 - a value, not a switch
        reading.offer("write", False, "cache_prompt")  # noqa: FBT003
    _read_prompt_cache(reading, request)


def _read_prompt_cache(reading: _Reading, request: CachedRequest) -> None:
    options = request.prompt_cache_options or {}
    reading.offer("ttl", _ttl(options.get("ttl")), "prompt_cache_options.ttl")
    if options.get("mode") == "explicit":
        reading.warnings.add(
            "prompt_cache_options.mode is ignored: every full block is kept, with or without breakpoints"
        )
    for name in options:
        if name not in ("ttl", "mode"):
            reading.warnings.add(f"prompt_cache_options.{name:.80} is unknown and ignored")
    retention = request.prompt_cache_retention
    if retention in ("in_memory", "in-memory"):
        reading.warnings.add("prompt_cache_retention is ignored: the server chooses the tiers")
    elif retention is not None and not reading.has("ttl"):
        reading.offer("ttl", retention, "prompt_cache_retention")


def _read_marks(reading: _Reading, marks: Sequence[object]) -> None:
    """The longest lifetime of all `cache_control` marks holds for the request."""
    ttls = []
    for mark in marks:
        if mark is None:
            continue
        if not isinstance(mark, Mapping):
            raise RequestError(
                f'cache_control={shown(mark)} is no object; give {{"type": "ephemeral"}}'
            )
        if (kind := mark.get("type", "ephemeral")) != "ephemeral":
            raise RequestError(f'cache_control.type={shown(kind)} is unknown; give "ephemeral"')
        ttls.append(_ttl(mark.get("ttl")) or _EPHEMERAL_TTL)
    if ttls:
        longest = max(ttls, key=lambda ttl: parse_duration("cache_control.ttl", ttl))
        reading.offer("ttl", longest, "cache_control.ttl")


def _ttl(value: object) -> object:
    """A lifetime as CacheOptions knows it: -1 is what some call for ever."""
    return "never" if value in (-1, "-1") and not isinstance(value, bool) else value


def _marks(objects: Sequence[Mapping[str, Any]]) -> Iterator[object]:
    for one in objects:
        yield one.get("cache_control")
        yield from (part.get("cache_control") for part in _parts(one))


def _placed_tags(messages: Sequence[Mapping[str, Any]], warnings: Warnings) -> Iterator[PlacedTag]:
    for number, message in enumerate(messages):
        where = f"messages[{number}].kv_cache"
        for tag in _tags(message.get("kv_cache"), where, warnings):
            yield PlacedTag(tag=tag, message=number)
        for place, part in enumerate(_parts(message)):
            where = f"messages[{number}].content[{place}].kv_cache"
            for tag in _tags(part.get("kv_cache"), where, warnings):
                yield PlacedTag(tag=tag, message=number, part=place)


def _tags(found: object, where: str, warnings: Warnings) -> list[str]:
    if found is None:
        return []
    if not isinstance(found, Mapping):
        raise RequestError(f'{where}={shown(found)} is no object; give {{"tags": ["doc:77"]}}')
    for name in found:
        if name != "tags":
            warnings.add(f"{where}.{name!s:.80} is ignored: only tags hold for a part")
    tags = found.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise RequestError(f"{where}.tags={shown(tags)} is no list of texts; give a list")
    return tags


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The content parts of a message; an empty mapping for what is none, so that numbers stay."""
    content = message.get("content")
    if not isinstance(content, list):
        return []
    return [part if isinstance(part, Mapping) else {} for part in content]


def _bare(message: Mapping[str, Any]) -> dict[str, Any]:
    bare = {name: value for name, value in message.items() if name not in _PART_FIELDS}
    if isinstance(content := message.get("content"), list):
        bare["content"] = [
            {name: value for name, value in part.items() if name not in _PART_FIELDS}
            if isinstance(part, Mapping)
            else part
            for part in content
        ]
    return bare


def _start(
    placed: PlacedTag, message_starts: Sequence[int], part_starts: Sequence[Sequence[int]]
) -> int:
    if placed.part is not None and placed.message < len(part_starts):
        starts = part_starts[placed.message]
        if placed.part < len(starts):
            return starts[placed.part]
    return message_starts[placed.message] if placed.message < len(message_starts) else 0
