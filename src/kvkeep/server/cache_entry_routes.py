"""/v1/cache/entries and pins: single blocks, and what is kept on purpose."""

from collections.abc import Callable, Sequence
from string import hexdigits
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from kvkeep.cache import BlockReport, PinId, Selector, SessionId
from kvkeep.llm import LLM
from kvkeep.server.block_content import block_content
from kvkeep.server.cache_groups import grouped
from kvkeep.server.cache_orders import purge_to_end
from kvkeep.server.cache_prompts import encode_given
from kvkeep.server.cache_schemas import EntryQuery, PinRequest
from kvkeep.server.cache_scope import AdminScope, AskerScope, Scope
from kvkeep.server.cache_state import CacheState, Kept
from kvkeep.server.cache_work import MOST_LISTED, block_fields, pin_fields, purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service, Serving
from kvkeep.spec import BlockKey

__all__ = ["pin_keys", "routes"]

_LEAST_DIGITS, _KEY_DIGITS = 8, 64


def routes() -> APIRouter:
    """The router of entries and pins."""
    router = APIRouter()
    _add_entries(router)
    _add_pins(router)
    return router


def _add_entries(router: APIRouter) -> None:
    @router.get("/v1/cache/entries")
    async def entries(
        service: Serving,
        scope: AdminScope,
        asked: Annotated[EntryQuery, Query()],
    ) -> dict[str, Any]:
        """Blocks by what they bear; with `by=labels` those that bear the same are one entry."""
        found = await service.call(_listing(asked, scope))
        if asked.by == "labels":
            rows = grouped(found, service.llm.settings.block_size, scope.named)
        else:
            found.sort(key=_ORDERS[asked.sort])
            rows = [scope.named(block_fields(one), one.namespace) for one in found]
        return _page(rows, asked.limit, asked.after)

    _add_entry(router)


def _add_entry(router: APIRouter) -> None:
    @router.get("/v1/cache/entries/{entry_id}")
    async def entry(
        service: Serving,
        scope: AskerScope,
        entry_id: str,
        salt: str | None = None,
        include: Literal["text"] | None = None,
    ) -> dict[str, Any]:
        """One block, of the asker's own; with `include=text` also what it is a block of.

        That is known of prompts that were sent lately; `content` is null for all others.
        """
        report = await service.call(_entry(entry_id, scope, salt))
        fields = scope.named(block_fields(report), report.namespace)
        if include is None:
            return fields
        return fields | {"content": await block_content(service, scope.tenant, report)}

    @router.delete("/v1/cache/entries/{entry_id}")
    async def remove_entry(
        service: Serving,
        scope: AdminScope,
        kept: Kept,
        entry_id: str,
        *,
        include_pinned: bool = False,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Forget one block everywhere."""
        find = _entry(entry_id, scope)

        def choose(llm: LLM) -> Selector:
            return Selector(keys=(find(llm).key,), include_pinned=include_pinned)

        receipt = await purge_to_end(service, choose, dry_run=dry_run)
        kept.events.purged(receipt, scope.owner)
        return purge_fields(receipt)


_ORDERS: dict[str, Callable[[BlockReport], Any]] = {
    "bytes": lambda one: (-one.num_bytes, one.key),
    "last_used": lambda one: (-(one.used_at or 0.0), one.key),
    "created": lambda one: (-one.created_at, one.key),
}


def _listing(asked: EntryQuery, scope: Scope) -> Callable[[LLM], list[BlockReport]]:
    """The question for all blocks that a list is about."""
    salts = scope.salts(asked.salt)
    tags = () if asked.tag is None else (asked.tag,)
    selector = Selector(tags=tags, salts=salts, everything=not (tags or salts))

    def ask(llm: LLM) -> list[BlockReport]:
        found = llm.cache.entries(selector, limit=MOST_LISTED)
        return [
            one
            for one in found
            if asked.tier in (None, *one.places) and asked.session in (None, *one.sessions)
        ]

    return ask


def _page(rows: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """A part of a list, as the protocols have it: `after` is the id of the last row that was seen."""
    start = 0
    if after is not None:
        ids = [row["id"] for row in rows]
        if after not in ids:
            raise ApiError(
                404, f"after={after!r:.80} is not in the list any more; begin anew", param="after"
            )
        start = ids.index(after) + 1
    page = rows[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "has_more": start + limit < len(rows),
        "last_id": page[-1]["id"] if page else None,
    }


def _entry(entry_id: str, scope: Scope, salt: str | None = None) -> Callable[[LLM], BlockReport]:
    """The question for a block by its key in hex, or by the first digits of it that no other begins with."""
    unknown = ApiError(404, f"there is no entry {entry_id!r:.80}", param="entry_id", code="unknown")
    is_hex = all(digit in hexdigits for digit in entry_id)
    if not (is_hex and _LEAST_DIGITS <= len(entry_id) <= _KEY_DIGITS):
        raise unknown
    is_whole, salts = len(entry_id) == _KEY_DIGITS, scope.salts(salt)

    def find(llm: LLM) -> BlockReport:
        selector = Selector(salts=salts, everything=not salts)
        if is_whole:
            selector = Selector(keys=(BlockKey(bytes.fromhex(entry_id)),), salts=salts)
        begin = entry_id.lower()
        listed = llm.cache.entries(selector, limit=MOST_LISTED)
        found = [one for one in listed if one.key.hex().startswith(begin)]
        if not found:
            raise unknown
        if len(found) > 1:
            message = (
                f"entry_id={entry_id!r} begins the keys of {len(found)} blocks; give more digits"
            )
            raise ApiError(400, message, param="entry_id")
        return found[0]

    return find


def _add_pins(router: APIRouter) -> None:
    @router.get("/v1/cache/pins")
    async def pins(service: Serving, scope: AdminScope) -> dict[str, Any]:
        """All pins, and the blocks that they mean."""
        reports = await service.call(lambda llm: llm.cache.pins())
        named = [(scope.own_pin(report), report) for report in reports]
        data = [
            scope.named(pin_fields(name, report), report.namespace)
            for name, report in named
            if name is not None
        ]
        return {"object": "list", "data": data}

    @router.post("/v1/cache/pins")
    async def pin(
        asked: PinRequest, service: Serving, scope: AdminScope, kept: Kept
    ) -> dict[str, Any]:
        """Keep known blocks until the pin of this name is removed. 413 where pins would hold too much."""
        ids = await _ids_to_pin(asked, service, scope, kept)
        salt = scope.salt(asked.salt)
        return await pin_keys(service, scope, asked.pin_name, ids, salt)

    @router.delete("/v1/cache/pins/{name:path}")
    async def unpin(service: Serving, scope: AdminScope, kept: Kept, name: str) -> dict[str, Any]:
        """End a pin; blocks that no other pin means are kept no longer than their labels say."""
        pin_id = PinId(scope.pin_name(name))

        def order(llm: LLM) -> int:
            if all(one.name != pin_id for one in llm.cache.pins()):
                raise ApiError(404, f"there is no pin {name!r:.200}", param="name", code="unknown")
            return llm.cache.unpin(pin_id).num_blocks

        return {"object": "cache.pin", "name": name, "affected": await service.call(order)}


async def _ids_to_pin(
    asked: PinRequest, service: Service, scope: Scope, kept: CacheState
) -> Sequence[int]:
    salt = scope.salt(asked.salt)
    if asked.context is not None:
        return kept.contexts.get(salt, asked.context).token_ids
    if asked.session is None:
        return (await encode_given(service, scope.tenant, asked)).ids
    session = asked.session

    def tokens(llm: LLM) -> list[int]:
        name = SessionId(llm.engine.namespace(salt).root_key(), session)
        known = llm.engine.cache.lifetimes.sessions.get(name)
        return [] if known is None or known.chain is None else known.chain.tokens()

    ids = await service.call(tokens)
    if not ids:
        raise ApiError(
            404,
            f"there is no session {session!r:.200} with a request that has ended since the start",
            param="session",
            code="unknown",
        )
    return ids


async def pin_keys(
    service: Service, scope: Scope, name: str, ids: Sequence[int], salt: str | None
) -> dict[str, Any]:
    """Pin what is known of a prompt. Raises PinCapacityError, with both numbers, over the cap."""
    pin_id = PinId(scope.pin_name(name))
    report = await service.call(lambda llm: llm.cache.pin(ids, name=pin_id, salt=salt))
    return {**pin_fields(name, report), "requested": len(ids) // service.llm.settings.block_size}
