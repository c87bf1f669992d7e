"""/v1/cache/contexts: prompts computed ahead and kept under a name, by pin or time to live."""

from array import array
from dataclasses import replace
from time import time
from typing import Any

from fastapi import APIRouter, Request

from kvkeep.cache import PinId, Receipt
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.server.cache_contexts import Context, session_of_context
from kvkeep.server.cache_entry_routes import pin_keys
from kvkeep.server.cache_orders import close_session, session_of
from kvkeep.server.cache_prompts import encode_given
from kvkeep.server.cache_schemas import ContextChange, ContextRequest
from kvkeep.server.cache_scope import AskerScope, Scope
from kvkeep.server.cache_state import CacheState, Kept
from kvkeep.server.cache_work import purge_fields, shown_time
from kvkeep.server.errors import ApiError
from kvkeep.server.jobs import Job
from kvkeep.server.service import Service, Serving, request_id_of

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
        _check_pin(scope, is_wanted=asked.pin)
        prompt = await encode_given(service, asked)
        salt = scope.salt(asked.salt)
        kept.contexts.check_room(salt, asked.name, len(prompt.ids))
        context = Context(
            name=asked.name,
            salt=salt,
            token_ids=array("I", prompt.ids),
            tags=tuple(asked.tags),
            ttl=asked.ttl,
            pin=None,
            created_at=time(),
            warmed_at=time(),
        )
        receipt = await _warm(service, scope, context, request_id_of(request))
        kept.contexts.put(context)
        if asked.pin:
            await _pin(service, scope, kept, context)
        found = kept.contexts.get(salt, asked.name)
        return {**await _fields(service, found), "receipt": _receipt_fields(receipt)}


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
        _check_pin(scope, is_wanted=asked.pinned is not None)
        context = kept.contexts.get(scope.salt(salt), name)
        if asked.ttl is not None or asked.tags is not None:
            tags = dict.fromkeys([*context.tags, *(asked.tags or ())])
            ttl = context.ttl if asked.ttl is None else asked.ttl
            context = replace(context, tags=tuple(tags), ttl=ttl, warmed_at=time())
            await _warm(service, scope, context, request_id_of(request))
            kept.contexts.put(context)
        if asked.pinned and context.pin is None:
            await _pin(service, scope, kept, context)
        elif asked.pinned is False and context.pin is not None:
            await _unpin(service, kept, context)
        return await _fields(service, kept.contexts.get(context.salt, name))


def _add_questions(router: APIRouter) -> None:
    @router.get("/v1/cache/contexts")
    async def contexts(
        service: Serving, scope: AskerScope, kept: Kept, salt: str | None = None
    ) -> dict[str, Any]:
        """All contexts of the asker, of everybody for an administrator."""
        known = list(kept.contexts.all(scope.salts(salt)))
        return {"object": "list", "data": [await _fields(service, one) for one in known]}

    @router.get("/v1/cache/contexts/{name:path}")
    async def context(
        service: Serving, scope: AskerScope, kept: Kept, name: str, salt: str | None = None
    ) -> dict[str, Any]:
        """One context, and how much of it is known now."""
        return await _fields(service, kept.contexts.get(scope.salt(salt), name))


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
        if not dry_run:
            known = kept.contexts.remove(effective, name)
            if known is not None and known.pin is not None:
                pin = PinId(known.pin)
                await service.call(lambda llm: llm.cache.unpin(pin))
        receipt = await close_session(service, session, effective, dry_run=dry_run)
        kept.events.purged(receipt)
        return purge_fields(receipt)


async def _warm(service: Service, scope: Scope, context: Context, request_id: str) -> Receipt:
    """Compute what is missing of a context, as a request without output."""
    job = Job(
        prompt_ids=context.token_ids,
        params=SamplingParams(max_tokens=0),
        options=CacheOptions(
            session=session_of_context(context.name),
            tags=context.tags,
            ttl=context.ttl,
            salt=context.salt,
        ),
        tenant=scope.tenant,
        request_id=request_id,
        route="/v1/cache/contexts",
    )
    reason = None
    async with service.generate(job) as stream:
        async for piece in stream:
            reason = piece.finish_reason or reason
        receipt = stream.receipt
    if receipt is None or reason is not FinishReason.LENGTH:
        raise ApiError(503, "the context could not be computed; try again", code="unavailable")
    return receipt


async def _pin(service: Service, scope: Scope, kept: CacheState, context: Context) -> None:
    name = session_of_context(context.name)
    await pin_keys(service, scope, name, context.token_ids, context.salt)
    kept.contexts.put(replace(context, pin=scope.pin_name(name)))


async def _unpin(service: Service, kept: CacheState, context: Context) -> None:
    assert context.pin is not None
    pin = PinId(context.pin)
    await service.call(lambda llm: llm.cache.unpin(pin))
    kept.contexts.put(replace(context, pin=None))


def _check_pin(scope: Scope, *, is_wanted: bool) -> None:
    if is_wanted and not scope.tenant.is_admin:
        raise ApiError(403, "pins need the admin key; leave pin out, and give a ttl", param="pin")


async def _fields(service: Service, context: Context) -> dict[str, Any]:
    ids, salt = context.token_ids, context.salt
    coverage = await service.call(lambda llm: llm.cache.coverage(ids, salt=salt))
    options = CacheOptions(ttl=context.ttl)
    ttl_s = options.ttl_s
    return {
        "object": "cache.context",
        "name": context.name,
        "tokens": len(ids),
        "known_tokens": coverage.known_tokens,
        "tags": list(context.tags),
        "ttl": context.ttl,
        "pinned": context.pin is not None,
        "created_at": shown_time(context.created_at),
        "warmed_at": shown_time(context.warmed_at),
        "expires_at": None if ttl_s is None else shown_time(context.warmed_at + ttl_s),
    }


def _receipt_fields(receipt: Receipt) -> dict[str, Any]:
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "reused_tokens": receipt.reused_tokens,
        "computed_tokens": receipt.computed_tokens,
        "tokens_by_source": receipt.tokens_by_source,
        "total_ms": round(receipt.total_s * 1e3, 1),
    }
