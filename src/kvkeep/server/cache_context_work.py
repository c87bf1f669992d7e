"""Making, renewing and pinning contexts, for routes and for what is computed at the start; and their JSON."""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from math import inf
from time import time
from typing import Any

from kvkeep.cache import PinId, Receipt
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.errors import RequestError
from kvkeep.llm import LLM
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_contexts import Context, session_of_context
from kvkeep.server.cache_entry_routes import pin_keys
from kvkeep.server.cache_erasures import Watch
from kvkeep.server.cache_inspection import inspection_of
from kvkeep.server.cache_prompts import encode_given
from kvkeep.server.cache_schemas import ContextRequest
from kvkeep.server.cache_scope import Scope
from kvkeep.server.cache_state import CacheState
from kvkeep.server.cache_work import shown_time
from kvkeep.server.errors import ApiError
from kvkeep.server.jobs import Job
from kvkeep.server.service import Service

__all__ = [
    "compute_context",
    "context_fields",
    "contexts_fields",
    "gone_context",
    "make_context",
    "outlast_sessions",
    "pin_context",
    "receipt_fields",
    "unpin_context",
    "written_ttl",
]

_ROUTE = "/v1/cache/contexts"


async def make_context(
    service: Service,
    scope: Scope,
    kept: CacheState,
    asked: ContextRequest,
    *,
    tenant: Tenant,
    request_id: str,
) -> Receipt:
    """Compute a prompt ahead, as a request of `tenant`, and keep it under a name; again renews it.

    Raises ApiError for what cannot be: too long, too many, erased meanwhile; PinCapacityError over the cap of
    pins, and then nothing is kept.
    """
    salt = scope.salt(asked.salt)
    watch = kept.watch(scope.tenant, salt)
    prompt = await encode_given(service, tenant, asked)
    context = Context(
        name=asked.name,
        salt=salt,
        token_ids=array("I", prompt.ids),
        tags=tuple(asked.tags),
        ttl=written_ttl(asked.ttl),
        pin=None,
        created_at=time(),
        warmed_at=time(),
        owner=scope.tenant.tenant_id,
    )
    kept.contexts.check_room(context)
    if asked.pin:
        await service.call(lambda llm: _check_pin_room(llm, prompt.ids, salt))
    _check_watch(watch)
    receipt = await compute_context(service, tenant, context, request_id)
    _check_watch(watch)
    context = await kept.keep(context)
    if asked.pin:
        await pin_context(service, scope, kept, context)
    return receipt


def written_ttl(ttl: float | str | None) -> float | str | None:
    """A time to live as JSON can have it, which knows no number without end."""
    return "never" if ttl == inf else ttl


def _check_watch(watch: Watch) -> None:
    if watch.is_erased:
        raise ApiError(
            409,
            "what the tenant has was erased while the context was computed; make the context again",
            code="erased",
        )


def gone_context(name: str) -> ApiError:
    """For a change of a context that was removed while it was carried out."""
    return ApiError(
        404, f"context {name!r:.200} was removed meanwhile; make it again", code="unknown"
    )


def _check_pin_room(llm: LLM, ids: Sequence[int], salt: str | None) -> None:
    chain = llm.engine.chain(ids, salt)
    llm.engine.cache.administration.check_pin_room(chain.root, chain.keys)


async def compute_context(
    service: Service, tenant: Tenant, context: Context, request_id: str
) -> Receipt:
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
        tenant=tenant,
        request_id=request_id,
        route=_ROUTE,
    )
    reason = None
    async with service.generate(job) as stream:
        async for piece in stream:
            reason = piece.finish_reason or reason
        receipt = stream.receipt
    if receipt is None or reason is not FinishReason.LENGTH:
        raise ApiError(503, "the context could not be computed; try again", code="unavailable")
    await service.call(lambda llm: outlast_sessions(llm, [context]))
    return receipt


def outlast_sessions(llm: LLM, contexts: Sequence[Context]) -> None:
    """Contexts end by their own time: `session_ttl` is not for the sessions that stand for them."""
    if llm.settings.session_ttl is None:
        return
    for context in contexts:
        # Unknown where nothing of it is left.
        with suppress(RequestError):
            llm.cache.change_session(
                session_of_context(context.name), ttl="never", salt=context.salt
            )


async def pin_context(service: Service, scope: Scope, kept: CacheState, context: Context) -> None:
    """Pin what is known of a context. Raises PinCapacityError over the cap, ApiError 404 if it is gone."""
    name = session_of_context(context.name)
    if context.salt != scope.tenant.salt:
        # Contexts of one name and several salts have a pin each.
        digest = sha256((context.salt or "").encode(errors="surrogatepass")).hexdigest()
        name += f"@{digest[:8]}"
    await pin_keys(service, scope, name, context.token_ids, context.salt)
    pin = PinId(scope.pin_name(name))
    if not await kept.renew(replace(context, pin=pin)):
        await service.call(lambda llm: _unpin(llm, pin))
        raise gone_context(context.name)


async def unpin_context(service: Service, kept: CacheState, context: Context) -> None:
    """End the pin of a context, if it has one still."""
    if context.pin is None:
        return
    pin = PinId(context.pin)
    await service.call(lambda llm: _unpin(llm, pin))
    await kept.renew(replace(context, pin=None))


def _unpin(llm: LLM, pin: PinId) -> None:
    # Others may have ended it, and a crash may have lost it.
    with suppress(RequestError):
        llm.cache.unpin(pin)


async def context_fields(service: Service, context: Context) -> dict[str, Any]:
    """A context, and how much of it is known now."""
    (fields,) = await contexts_fields(service, [context])
    return fields


async def contexts_fields(service: Service, contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """The same of several; requests go on between them."""
    pins = await service.call(_pin_names)
    return [await _fields(service, one, is_pinned=one.pin in pins) for one in contexts]


async def _fields(service: Service, context: Context, *, is_pinned: bool) -> dict[str, Any]:
    ids, salt = context.token_ids, context.salt
    coverage = await service.call(lambda llm: llm.cache.coverage(ids, salt=salt))
    ttl_s = CacheOptions(ttl=context.ttl).ttl_s
    return {
        "object": "cache.context",
        "name": context.name,
        "tokens": len(ids),
        "known_tokens": coverage.known_tokens,
        "tags": list(context.tags),
        "ttl": context.ttl,
        "pinned": is_pinned,
        "created_at": shown_time(context.created_at),
        "warmed_at": shown_time(context.warmed_at),
        "expires_at": None if ttl_s is None else shown_time(context.warmed_at + ttl_s),
    }


def receipt_fields(receipt: Receipt) -> dict[str, Any]:
    """What it took to compute a context."""
    return {
        "prompt_tokens": receipt.prompt_tokens,
        "reused_tokens": receipt.reused_tokens,
        "computed_tokens": receipt.computed_tokens,
        "tokens_by_source": receipt.tokens_by_source,
        "total_ms": round(receipt.total_s * 1e3, 1),
    }


def _pin_names(llm: LLM) -> frozenset[PinId]:
    llm.engine.cache.administration.purges.wait_until_restored()
    return inspection_of(llm).pin_names()
