"""Lists of blocks, picked as they are walked over: what is not shown is not reported."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from string import hexdigits
from typing import TypeAlias

from kvkeep.cache import BlockReport, Selector
from kvkeep.cache.inspection import Inspection
from kvkeep.cache.slices import Bits
from kvkeep.llm import LLM
from kvkeep.server.cache_groups import BlockGroup, Groups
from kvkeep.server.cache_inspection import Question, inspection_of, query_of
from kvkeep.server.cache_schemas import EntryQuery
from kvkeep.server.cache_scope import Scope
from kvkeep.server.errors import ApiError
from kvkeep.spec import BlockKey

__all__ = ["Page", "block_page", "entry_of", "group_page"]

# What is listed first has the least rank: a number, and a name where these are equal.
Rank: TypeAlias = tuple[float, bytes]

_LEAST_DIGITS, _KEY_DIGITS = 8, 64
# Of so many ranks those are kept that will be shown.
_MANY = 4096


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list of blocks."""

    reports: list[BlockReport]
    has_more: bool


@dataclass(frozen=True, slots=True)
class GroupPage:
    """A part of a list of groups."""

    groups: list[BlockGroup]
    has_more: bool


class _Selection:
    """The first ranks behind one, of many that come in no order."""

    def __init__(self, limit: int, after: Rank | None) -> None:
        self._limit = limit
        self._after = after
        self._ranks: list[Rank] = []

    def add(self, ranks: Iterable[Rank]) -> None:
        """Take some more."""
        after = self._after
        self._ranks += ranks if after is None else [one for one in ranks if one > after]
        if len(self._ranks) > _MANY:
            self._ranks = nsmallest(self._limit + 1, self._ranks)

    def names(self) -> list[bytes]:
        """The names of the first, in order, and one more where there are more."""
        return [name for _, name in nsmallest(self._limit + 1, self._ranks)]


def block_page(asked: EntryQuery, scope: Scope) -> Question[Page]:
    """The question for one page of blocks. It raises ApiError 404 where `after` is in the list no more."""

    def ask(llm: LLM) -> Bits[Page]:
        inspection, query = inspection_of(llm), query_of(llm, _selector(asked, scope))
        after = None if asked.after is None else _key_after(asked.after)
        starts = [] if after is None else _ranks(inspection, [after], asked.sort)
        selection = _Selection(asked.limit, starts[0] if starts else None)
        is_after_seen = after is None
        for keys in inspection.walk(query):
            fitting = _fitting(inspection, keys, asked)
            is_after_seen = is_after_seen or after in fitting
            selection.add(_ranks(inspection, fitting, asked.sort))
            yield
        if not is_after_seen:
            raise _gone(asked.after)
        names = [BlockKey(name) for name in selection.names()]
        reports = yield from inspection.all_reports(names[: asked.limit])
        return Page(reports, has_more=len(names) > asked.limit)

    return ask


def group_page(asked: EntryQuery, scope: Scope) -> Question[GroupPage]:
    """The question for one page of groups of blocks that bear the same, the largest first."""

    def ask(llm: LLM) -> Bits[GroupPage]:
        inspection, query = inspection_of(llm), query_of(llm, _selector(asked, scope))
        groups = Groups(llm.settings.block_size)
        for keys in inspection.walk(query):
            groups.add(inspection.reports(_fitting(inspection, keys, asked)))
            yield
        name_to_group = yield from groups.named()
        after = None
        if asked.after is not None:
            first = next((one for one in name_to_group.values() if one.id == asked.after), None)
            if first is None:
                raise _gone(asked.after)
            after = (-first.num_bytes, first.name)
        selection = _Selection(asked.limit, after)
        for name, group in name_to_group.items():
            selection.add([(-group.num_bytes, name)])
            yield
        names = selection.names()
        page = [name_to_group[name] for name in names[: asked.limit]]
        return GroupPage(page, has_more=len(names) > asked.limit)

    return ask


def entry_of(entry_id: str, scope: Scope, salt: str | None = None) -> Question[BlockReport]:
    """The question for a block by its key in hex, or by the first digits of it that no other begins with."""
    unknown = ApiError(404, f"there is no entry {entry_id!r:.80}", param="entry_id", code="unknown")
    is_hex = all(digit in hexdigits for digit in entry_id)
    if not (is_hex and _LEAST_DIGITS <= len(entry_id) <= _KEY_DIGITS):
        raise unknown
    salts, begin = scope.salts(salt), entry_id.lower()

    def find(llm: LLM) -> Bits[BlockReport]:
        inspection = inspection_of(llm)
        query = query_of(llm, Selector(salts=salts, everything=not salts))
        found: list[BlockKey] = []
        if len(begin) == _KEY_DIGITS:
            found = inspection.known(query, [BlockKey(bytes.fromhex(begin))])
        else:
            for keys in inspection.walk(query, lambda key: key.hex().startswith(begin)):
                found += keys
                yield
        if len(found) > 1:
            message = (
                f"entry_id={entry_id!r} begins the keys of {len(found)} blocks; give more digits"
            )
            raise ApiError(400, message, param="entry_id")
        for report in inspection.reports(found):
            return report
        raise unknown

    return find


def _selector(asked: EntryQuery, scope: Scope) -> Selector:
    salts = scope.salts(asked.salt)
    tags = () if asked.tag is None else (asked.tag,)
    return Selector(tags=tags, salts=salts, everything=not (tags or salts))


def _fitting(inspection: Inspection, keys: Sequence[BlockKey], asked: EntryQuery) -> list[BlockKey]:
    """Those blocks that lie and are used where it is asked for."""
    if asked.session is not None:
        bearing = [(key, inspection.labels(key)) for key in keys]
        keys = [key for key, labels in bearing if labels and asked.session in labels.sessions]
    if asked.tier is not None:
        held = zip(keys, inspection.held(keys), strict=True)
        keys = [key for key, one in held if asked.tier in one.place_to_bytes]
    return list(keys)


def _ranks(inspection: Inspection, keys: Sequence[BlockKey], sort: str) -> list[Rank]:
    """The largest, the last used or the newest first; only known blocks have a rank."""
    if sort == "bytes":
        return [
            (-held.num_bytes, key) for key, held in zip(keys, inspection.held(keys), strict=True)
        ]
    if sort == "last_used":
        return [(-(inspection.used_at(key) or 0.0), key) for key in keys]
    bearing = [(key, inspection.labels(key)) for key in keys]
    return [(-labels.created_at, key) for key, labels in bearing if labels is not None]


def _key_after(after: str) -> BlockKey:
    if len(after) != _KEY_DIGITS or any(digit not in hexdigits for digit in after):
        raise _gone(after)
    return BlockKey(bytes.fromhex(after))


def _gone(after: str | None) -> ApiError:
    return ApiError(
        404, f"after={after!r:.80} is not in the list any more; begin anew", param="after"
    )
