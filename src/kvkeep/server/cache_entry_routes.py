"""/v1/cache/entries and pins: single blocks, and what is kept on purpose."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from kvkeep.cache import PinId, Selector, SessionId
from kvkeep.errors import RequestError
from kvkeep.llm import LLM
from kvkeep.server.block_content import block_content
from kvkeep.server.cache_inspection import inspection_of
from kvkeep.server.cache_listing import block_page, entry_of, group_page
from kvkeep.server.cache_orders import planned_purge, purge
from kvkeep.server.cache_prompts import encode_given
from kvkeep.server.cache_schemas import EntryQuery, PinRequest
from kvkeep.server.cache_scope import AdminScope, AskerScope, Scope
from kvkeep.server.cache_state import CacheState, Kept
from kvkeep.server.cache_work import block_fields, pin_fields, purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service, Serving

__all__ = ["pin_keys", "routes"]


def routes() -> APIRouter:
    """The router of entries and pins."""
    router = APIRouter()
    _add_entries(router)
    _add_pins(router)
    return router


def _add_entries(router: APIRouter) -> None:
    @router.get("/v1/cache/entries")
    async def entries(
        scope: AdminScope,
        kept: Kept,
        asked: Annotated[EntryQuery, Query()],
    ) -> dict[str, Any]:
        """Blocks by what they bear; with `by=labels` those that bear the same are one entry.

        Decoding goes on meanwhile, so that the list may be of slightly different moments.
        """
        if asked.by == "labels":
            groups = await kept.inspections.ask(scope.tenant, group_page(asked, scope))
            rows = [scope.named(one.fields(), one.first.namespace) for one in groups.groups]
            return _page(rows, has_more=groups.has_more)
        blocks = await kept.inspections.ask(scope.tenant, block_page(asked, scope))
        rows = [scope.named(block_fields(one), one.namespace) for one in blocks.reports]
        return _page(rows, has_more=blocks.has_more)

    _add_entry(router)


def _add_entry(router: APIRouter) -> None:
    @router.get("/v1/cache/entries/{entry_id}")
    async def entry(
        service: Serving,
        scope: AskerScope,
        kept: Kept,
        entry_id: str,
        salt: str | None = None,
        include: Literal["text"] | None = None,
    ) -> dict[str, Any]:
        """One block, of the asker's own; with `include=text` also what it is a block of.

        That is known of prompts that were sent lately; `content` is null for all others.
        """
        report = await kept.inspections.ask(scope.tenant, entry_of(entry_id, scope, salt))
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
        report = await kept.inspections.ask(scope.tenant, entry_of(entry_id, scope))
        chosen = Selector(keys=(report.key,), include_pinned=include_pinned)
        if dry_run:
            planned = await planned_purge(kept.inspections, scope.tenant, lambda _: chosen)
            return purge_fields(planned)
        receipt = await purge(service, lambda _: chosen)
        kept.events.purged(receipt, scope.owner)
        return purge_fields(receipt)


def _page(rows: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A part of a list, as the protocols have it."""
    last_id = rows[-1]["id"] if rows else None
    return {"object": "list", "data": rows, "has_more": has_more, "last_id": last_id}


def _add_pins(router: APIRouter) -> None:
    @router.get("/v1/cache/pins")
    async def pins(scope: AdminScope, kept: Kept) -> dict[str, Any]:
        """All pins, and the blocks that they mean."""
        reports = await kept.inspections.ask(scope.tenant, lambda llm: inspection_of(llm).pins())
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
            try:
                return llm.cache.unpin(pin_id).num_blocks
            except RequestError as error:
                raise ApiError(
                    404, f"there is no pin {name!r:.200}", param="name", code="unknown"
                ) from error

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
