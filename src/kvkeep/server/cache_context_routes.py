"""/v1/cache/contexts: prompts computed ahead and kept under a name, by pin or time to live."""

from dataclasses import replace
from time import time
from typing import Any

from fastapi import APIRouter, Request

from kvkeep.server.cache_context_work import (
    compute_context,
    context_fields,
    contexts_fields,
    gone_context,
    make_context,
    pin_context,
    receipt_fields,
    unpin_context,
    written_ttl,
)
from kvkeep.server.cache_contexts import session_of_context
from kvkeep.server.cache_orders import close_session, planned_close, session_of
from kvkeep.server.cache_schemas import ContextChange, ContextRequest
from kvkeep.server.cache_scope import AskerScope, check_pins
from kvkeep.server.cache_state import Kept
from kvkeep.server.cache_work import purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Serving, request_id_of

__all__ = ["routes"]


def routes() -> APIRouter:
    """The router of contexts."""
    router = APIRouter()
    _add_making(router)
    _add_changes(router)
    _add_questions(router)
    _add_removal(router)
    return router


def _add_making(router: APIRouter) -> None:
    @router.post("/v1/cache/contexts", status_code=201)
    async def make(
        asked: ContextRequest, request: Request, service: Serving, scope: AskerScope, kept: Kept
    ) -> dict[str, Any]:
        """Compute a prompt ahead and keep it under a name; again renews it. Waits its turn as requests do."""
        if asked.pin:
            check_pins(scope, "pin")
        receipt = await make_context(
            service,
            scope,
            kept,
            asked,
            tenant=scope.tenant,
            request_id=request_id_of(request),
        )
        found = kept.contexts.get(scope.salt(asked.salt), asked.name)
        return {**await context_fields(service, found), "receipt": receipt_fields(receipt)}


def _add_changes(router: APIRouter) -> None:
    @router.patch("/v1/cache/contexts/{name:path}")
    async def change(
        asked: ContextChange,
        request: Request,
        service: Serving,
        scope: AskerScope,
        kept: Kept,
        name: str,
        salt: str | None = None,
    ) -> dict[str, Any]:
        """Give a context more time, further tags, or a pin; what of it was lost is computed again."""
        if asked.pinned is not None:
            check_pins(scope, "pinned")
        context = kept.contexts.get(scope.salt(salt), name)
        if asked.ttl is not None or asked.tags is not None:
            tags = dict.fromkeys([*context.tags, *(asked.tags or ())])
            ttl = context.ttl if asked.ttl is None else written_ttl(asked.ttl)
            context = replace(context, tags=tuple(tags), ttl=ttl, warmed_at=time())
            await compute_context(service, scope.tenant, context, request_id_of(request))
            if not await kept.renew(context):
                raise gone_context(name)
        if asked.pinned:
            await pin_context(service, scope, kept, context)
        elif asked.pinned is False:
            await unpin_context(service, kept, context)
        return await context_fields(service, kept.contexts.get(context.salt, name))


def _add_questions(router: APIRouter) -> None:
    @router.get("/v1/cache/contexts")
    async def contexts(
        service: Serving, scope: AskerScope, kept: Kept, salt: str | None = None
    ) -> dict[str, Any]:
        """All contexts of the asker, of everybody for an administrator."""
        known = list(kept.contexts.all(scope.salts(salt)))
        rows = await contexts_fields(service, known)
        data = [scope.named_by_salt(row, one.salt) for row, one in zip(rows, known, strict=True)]
        return {"object": "list", "data": data}

    @router.get("/v1/cache/contexts/{name:path}")
    async def context(
        service: Serving, scope: AskerScope, kept: Kept, name: str, salt: str | None = None
    ) -> dict[str, Any]:
        """One context, and how much of it is known now."""
        return await context_fields(service, kept.contexts.get(scope.salt(salt), name))


def _add_removal(router: APIRouter) -> None:
    @router.delete("/v1/cache/contexts/{name:path}")
    async def remove(
        service: Serving,
        scope: AskerScope,
        kept: Kept,
        name: str,
        salt: str | None = None,
        *,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Forget a context: its pin, and the blocks that nobody else uses."""
        effective = scope.salt(salt)
        session = session_of_context(name)
        try:
            await service.call(session_of(session, effective))
        except ApiError:
            # Its blocks are gone, or it was never there; the book may still have its name.
            kept.contexts.get(effective, name)
        if dry_run:
            return purge_fields(
                await planned_close(kept.inspections, scope.tenant, session, effective)
            )
        known = kept.contexts.find(effective, name)
        if known is not None:
            await unpin_context(service, kept, known)
            await kept.forget(known)
        receipt = await close_session(service, session, effective)
        kept.events.purged(receipt, scope.owner)
        return purge_fields(receipt)
