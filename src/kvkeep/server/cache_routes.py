"""/v1/cache: what is cached, what is known of a prompt, purges, events; and the routes of other servers."""

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query

from kvkeep.cache import Selector
from kvkeep.config.durations import parse_duration
from kvkeep.llm import LLM
from kvkeep.planning import DEVICE
from kvkeep.server import (
    cache_context_routes,
    cache_entry_routes,
    cache_quota_routes,
    cache_session_routes,
)
from kvkeep.server.cache_checks import verification
from kvkeep.server.cache_orders import planned_purge, purge
from kvkeep.server.cache_prompts import GivenPrompt, encode_given
from kvkeep.server.cache_report import miss_fields
from kvkeep.server.cache_schemas import LookupRequest, PurgeRequest, VerifyRequest
from kvkeep.server.cache_scope import AdminScope, AskerScope, Scope, named_scope
from kvkeep.server.cache_state import Kept
from kvkeep.server.cache_work import cache_fields, known_of, own_fields, purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.model_profile import Profile
from kvkeep.server.service import Service, Serving
from kvkeep.server.sse import EventStream
from kvkeep.server.tenant_erasure import erase_kept, erase_sessions
from kvkeep.server.warming import keeping_warm

__all__ = ["routes", "selector_for"]


def routes() -> APIRouter:
    """The routers of the cache, which keep their state in `app.state.cache`."""
    router = APIRouter(lifespan=keeping_warm, tags=["cache"])
    _add_questions(router)
    _add_orders(router)
    _add_resets(router)
    parts = (cache_entry_routes, cache_quota_routes, cache_session_routes, cache_context_routes)
    for part in parts:
        router.include_router(part.routes())
    return router


def _add_questions(router: APIRouter) -> None:
    @router.get("/v1/cache")
    async def state(scope: AdminScope, kept: Kept) -> dict[str, Any]:
        """Capacity and content of the device and of every tier, hit rate, pins, policy, fingerprint.

        For a tenant that shares with nobody: what it has itself.
        """
        if scope.sees_all:
            return await kept.inspections.ask(scope.tenant, cache_fields)
        tokens = kept.tenants.tokens_of(scope.tenant)
        question = own_fields(scope.salts(None), tokens, own_pin=scope.own_pin)
        return await kept.inspections.ask(scope.tenant, question)

    @router.post("/v1/cache/lookup")
    async def lookup(
        asked: LookupRequest, service: Serving, scope: AskerScope, kept: Kept, profile: Profile
    ) -> dict[str, Any]:
        """What a request with this prompt would find, and why not more. Nothing is computed or changed."""
        prompt = await encode_given(service, scope.tenant, asked)
        question = known_of(
            prompt,
            salt=scope.salt(asked.asked_salt),
            owner=scope.tenant.tenant_id,
            session=asked.asked_session,
        )
        known = await service.call(question)
        fields = known.fields()
        fields["ttft_ms_est"] = kept.times.estimate_ms(fields["missing_tokens"])
        fields["miss"] = miss_fields(known.miss, profile.token_texts)
        return fields

    @router.get("/v1/cache/events", response_class=EventStream, status_code=200)
    async def events(service: Serving, scope: AdminScope, kept: Kept) -> EventStream:
        """Server-sent events: hit, miss, stored, evicted, expired, demoted, promoted, purged, and others."""
        keep_alive_s = service.settings.keep_alive_s
        return EventStream(kept.events.stream(keep_alive_s=keep_alive_s, tenant=scope.owner))


def _add_orders(router: APIRouter) -> None:
    @router.post("/v1/cache/purge")
    async def purge_blocks(
        asked: PurgeRequest, service: Serving, scope: AdminScope, kept: Kept
    ) -> dict[str, Any]:
        """Forget what the fields mean, everywhere, and say how much that was."""
        scope = named_scope(scope, asked.tenant)
        prompt = (
            None
            if asked.prefix is None
            else await encode_given(service, scope.tenant, asked.prefix)
        )
        chosen = selector_for(asked, scope, prompt)
        if asked.erases_tenant:
            await erase_kept(service, kept, scope.salts(asked.salt))
        if asked.dry_run:
            return purge_fields(await planned_purge(kept.inspections, scope.tenant, chosen))
        receipt = await purge(service, chosen)
        kept.events.purged(receipt, scope.owner)
        if asked.erases_tenant:
            await erase_sessions(service, scope.salts(asked.salt))
        return purge_fields(receipt)

    @router.post("/v1/cache/verify")
    async def verify(
        scope: AdminScope, kept: Kept, asked: VerifyRequest | None = None
    ) -> dict[str, Any]:
        """Check every invariant of the bookkeeping, and with `tiers` read all they have. Repairs nothing.

        For a tenant that shares with nobody: its own blocks. Decoding waits for the bookkeeping as a whole,
        not for blocks and tiers.
        """
        question = verification(scope, tiers=asked is not None and asked.tiers)
        report = await kept.checks.ask(scope.tenant, question)
        return {
            "ok": report.ok,
            "blocks_checked": report.blocks_checked,
            "problems": list(report.problems),
        }


def _add_resets(router: APIRouter) -> None:
    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(
        service: Serving,
        scope: AdminScope,
        kept: Kept,
        *,
        reset_external: Annotated[bool, Query()] = False,
    ) -> dict[str, Any]:
        """As vLLM has it: forget what is on the device, with `reset_external` in the tiers too."""
        return await _clear(service, scope, kept, tiers=None if reset_external else [DEVICE])

    @router.post("/flush_cache")
    @router.get("/flush_cache")
    async def flush_cache(service: Serving, scope: AdminScope, kept: Kept) -> dict[str, Any]:
        """As SGLang has it: forget everything; blocks of running requests stay theirs alone."""
        return await _clear(service, scope, kept, tiers=None)


async def _clear(
    service: Service, scope: Scope, kept: Kept, *, tiers: list[str] | None
) -> dict[str, Any]:
    chosen = selector_for(PurgeRequest(all=True, tiers=tiers), scope, None)
    receipt = await purge(service, chosen)
    kept.events.purged(receipt, scope.owner)
    return purge_fields(receipt)


def selector_for(
    asked: PurgeRequest, scope: Scope, prompt: GivenPrompt | None
) -> Callable[[LLM], Selector]:
    """What a purge means. Raises ApiError, or ConfigError, for a request that means nothing."""
    older_than_s = _age("older_than", asked.older_than)
    unused_for_s = _age("unused_for", asked.unused_for)
    choices = [asked.sessions, asked.tags, prompt, asked.older_than, asked.unused_for]
    is_narrow = any(one not in (None, []) for one in choices)
    salts = scope.salts(asked.salt)
    if asked.all and is_narrow:
        raise ApiError(
            400, "all=true leaves nothing to choose; give it without other choices", param="all"
        )
    # The tenant's own salt is never a choice by itself: that would empty the cache by mistake.
    names_tenant = asked.salt is not None or asked.tenant is not None
    if not (asked.all or is_narrow or names_tenant):
        raise ApiError(
            400,
            "the purge names no block; give sessions, tags, salt, tenant, prefix or an age, or all=true",
        )

    def choose(llm: LLM) -> Selector:
        _check_tiers(llm, asked.tiers)
        keys = None
        if prompt is not None:
            assert asked.prefix is not None
            keys = llm.cache.keys(prompt.ids, salt=scope.salt(asked.prefix.salt))
        return Selector(
            tags=tuple(asked.tags),
            sessions=tuple(asked.sessions),
            salts=salts,
            keys=keys,
            older_than_s=older_than_s,
            unused_for_s=unused_for_s,
            everything=asked.all and not salts,
            include_pinned=asked.include_pinned,
            tiers=None if asked.tiers is None else tuple(asked.tiers),
        )

    return choose


def _age(field: str, value: float | str | None) -> float | None:
    return None if value is None else parse_duration(field, value)


def _check_tiers(llm: LLM, tiers: list[str] | None) -> None:
    known = [DEVICE, *(report.tier.name for report in llm.cache.stats().tiers)]
    for name in tiers or ():
        if name not in known:
            raise ApiError(
                400, f"tiers has {name!r:.80}; choose from {', '.join(known)}", param="tiers"
            )
