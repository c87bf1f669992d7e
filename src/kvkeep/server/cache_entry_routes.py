"""/v1/cache/entries, pins and quotas: single blocks, what is kept on purpose, and the shares of tenants."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query

from kvkeep.cache import BlockReport, PinId, QuotaReport, Selector, SessionId
from kvkeep.errors import CapacityError
from kvkeep.llm import LLM
from kvkeep.server.cache_groups import grouped
from kvkeep.server.cache_orders import purge_to_end
from kvkeep.server.cache_prompts import encode_given
from kvkeep.server.cache_schemas import EntryQuery, PinRequest, QuotaRequest
from kvkeep.server.cache_scope import AdminScope, Scope
from kvkeep.server.cache_state import CacheState, Kept
from kvkeep.server.cache_work import block_fields, pin_fields, purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service, Serving
from kvkeep.spec import BlockKey

__all__ = ["pin_keys", "routes"]

# Of these a list is made; those that were used longer ago are not listed.
_MOST_LISTED = 50_000


def routes() -> APIRouter:
    """The router of entries, pins and quotas."""
    router = APIRouter()
    _add_entries(router)
    _add_pins(router)
    _add_quotas(router)
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
            rows = grouped(found, service.llm.settings.block_size)
        else:
            rows = [block_fields(one) for one in sorted(found, key=_ORDERS[asked.sort])]
        return _page(rows, asked.limit, asked.after)

    _add_entry(router)


def _add_entry(router: APIRouter) -> None:
    @router.get("/v1/cache/entries/{entry_id}")
    async def entry(service: Serving, scope: AdminScope, entry_id: str) -> dict[str, Any]:
        """One block."""
        return block_fields(await service.call(_entry(entry_id, scope)))

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
        kept.events.purged(receipt)
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
        found = llm.cache.entries(selector, limit=_MOST_LISTED)
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


def _entry(entry_id: str, scope: Scope) -> Callable[[LLM], BlockReport]:
    unknown = ApiError(404, f"there is no entry {entry_id!r:.80}", param="entry_id", code="unknown")
    try:
        key = BlockKey(bytes.fromhex(entry_id))
    except ValueError:
        raise unknown from None

    def find(llm: LLM) -> BlockReport:
        found = llm.cache.entries(Selector(keys=(key,), salts=scope.salts(None)))
        if not found:
            raise unknown
        return found[0]

    return find


def _add_pins(router: APIRouter) -> None:
    @router.get("/v1/cache/pins")
    async def pins(service: Serving, scope: AdminScope) -> dict[str, Any]:
        """All pins, and the blocks that they mean."""
        reports = await service.call(lambda llm: llm.cache.pins())
        named = [(scope.own_pin(report.name), report) for report in reports]
        data = [pin_fields(name, report) for name, report in named if name is not None]
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
        return (await encode_given(service, asked)).ids
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
    """Pin what is known of a prompt. Raises ApiError 413, with both numbers, over the cap."""
    pin_id = PinId(scope.pin_name(name))
    try:
        report = await service.call(lambda llm: llm.cache.pin(ids, name=pin_id, salt=salt))
    except CapacityError as error:
        raise ApiError(413, str(error), code="pin_cap") from error
    return {**pin_fields(name, report), "requested": len(ids) // service.llm.settings.block_size}


def _add_quotas(router: APIRouter) -> None:
    @router.get("/v1/cache/quotas")
    async def quotas(service: Serving, scope: AdminScope) -> dict[str, Any]:
        """What tenants may take, and take."""
        reports = await service.call(lambda llm: llm.cache.quotas())
        own = scope.salts(None)
        data = [_quota_fields(one) for one in reports if not own or one.salt in own]
        return {"object": "list", "data": data}

    @router.put("/v1/cache/quotas/{salt:path}")
    async def set_quota(
        asked: QuotaRequest, service: Serving, scope: AdminScope, salt: str
    ) -> dict[str, Any]:
        """Bound the bytes of the blocks of one salt."""
        _only_all(scope)
        await service.call(lambda llm: llm.cache.set_quota(salt, asked.limit_bytes))
        return await _quota(service, salt)

    @router.get("/v1/cache/quotas/{salt:path}")
    async def quota(service: Serving, scope: AdminScope, salt: str) -> dict[str, Any]:
        """What one salt may take, and takes."""
        _only_all(scope)
        return await _quota(service, salt)

    @router.delete("/v1/cache/quotas/{salt:path}")
    async def remove_quota(service: Serving, scope: AdminScope, salt: str) -> dict[str, Any]:
        """Lift a bound."""
        _only_all(scope)
        fields = await _quota(service, salt)
        await service.call(lambda llm: llm.cache.set_quota(salt, None))
        return {**fields, "deleted": True}


def _only_all(scope: Scope) -> None:
    if not scope.sees_all:
        raise ApiError(403, "quotas are set with the admin key; start the server with --admin-key")


async def _quota(service: Service, salt: str) -> dict[str, Any]:
    for one in await service.call(lambda llm: llm.cache.quotas()):
        if one.salt == salt:
            return _quota_fields(one)
    raise ApiError(404, f"salt {salt!r:.200} has no quota", param="salt", code="unknown")


def _quota_fields(report: QuotaReport) -> dict[str, Any]:
    return {
        "object": "cache.quota",
        "salt": report.salt,
        "limit_bytes": report.limit_bytes,
        "used_bytes": report.used_bytes,
    }
