"""/v1/cache/quotas: the shares of tenants."""

from typing import Any

from fastapi import APIRouter

from kvkeep.cache import QuotaReport
from kvkeep.server.cache_schemas import QuotaRequest
from kvkeep.server.cache_scope import AdminScope, Scope
from kvkeep.server.cache_state import Kept
from kvkeep.server.errors import ApiError
from kvkeep.server.quota_file import KeptQuota
from kvkeep.server.service import Service, Serving

__all__ = ["routes"]


def routes() -> APIRouter:
    """The router of quotas: by a tenant's id where keys are apart, else by salt."""
    router = APIRouter()
    _add_questions(router)
    _add_orders(router)
    return router


def _add_questions(router: APIRouter) -> None:
    @router.get("/v1/cache/quotas")
    async def quotas(service: Serving, scope: AdminScope) -> dict[str, Any]:
        """What tenants may take, and take."""
        reports = await service.call(lambda llm: llm.cache.quotas())
        own = scope.salts(None)
        data = [_fields(one, scope) for one in reports if not own or one.salt in own]
        return {"object": "list", "data": data}

    @router.get("/v1/cache/quotas/{salt:path}")
    async def quota(
        service: Serving, scope: AdminScope, salt: str, tier: str | None = None
    ) -> dict[str, Any]:
        """What one salt may take, and takes, in a tier or altogether."""
        return await _quota(service, scope, _whose(scope, salt), tier)


def _add_orders(router: APIRouter) -> None:
    @router.put("/v1/cache/quotas")
    @router.put("/v1/cache/quotas/{salt:path}")
    async def set_quota(
        asked: QuotaRequest,
        service: Serving,
        scope: AdminScope,
        kept: Kept,
        salt: str | None = None,
    ) -> dict[str, Any]:
        """Bound the bytes of the blocks of one tenant or salt, in a tier or altogether."""
        whose, limit, tier = _whose(scope, salt), asked.limit_bytes, asked.tier
        report = await service.call(lambda llm: llm.cache.set_quota(whose, limit, tier=tier))
        assert report is not None, "only a quota without a limit has none"
        await kept.keep_quota(KeptQuota(whose, tier, report.limit_bytes))
        return _fields(report, scope)

    @router.delete("/v1/cache/quotas")
    @router.delete("/v1/cache/quotas/{salt:path}")
    async def remove_quota(
        service: Serving,
        scope: AdminScope,
        kept: Kept,
        salt: str | None = None,
        tier: str | None = None,
    ) -> dict[str, Any]:
        """Lift a bound."""
        whose = _whose(scope, salt)
        fields = await _quota(service, scope, whose, tier)
        await service.call(lambda llm: llm.cache.set_quota(whose, None, tier=tier))
        await kept.lift_quota(whose, tier)
        return {**fields, "deleted": True}


def _whose(scope: Scope, salt: str | None) -> str:
    """The salt whose quota is meant. A limit on a salt that no request can have would limit nothing."""
    if not (scope.sees_all or scope.is_named):
        raise ApiError(403, "quotas are set with the admin key; start the server with --admin-key")
    if scope.is_named and salt is None and scope.tenant.salt is not None:
        return scope.tenant.salt
    if scope.tenants:
        raise ApiError(
            400,
            "keys have salts of their own here; name a tenant: /v1/cache/quotas?tenant=ID",
            param="tenant",
        )
    if salt is None:
        raise ApiError(400, "salt is missing; give /v1/cache/quotas/SALT", param="salt")
    return salt


async def _quota(service: Service, scope: Scope, salt: str, tier: str | None) -> dict[str, Any]:
    for one in await service.call(lambda llm: llm.cache.quotas()):
        if (one.salt, one.tier) == (salt, tier):
            return _fields(one, scope)
    whose = f"tenant {scope.tenant.tenant_id}" if scope.is_named else f"salt {salt!r:.200}"
    where = "" if tier is None else f" in tier {tier!r:.200}"
    raise ApiError(404, f"{whose} has no quota{where}", param="salt", code="unknown")


def _fields(report: QuotaReport, scope: Scope) -> dict[str, Any]:
    fields = {
        "object": "cache.quota",
        "salt": report.salt,
        "tier": report.tier,
        "limit_bytes": report.limit_bytes,
        "used_bytes": report.used_bytes,
    }
    if not scope.tenants:
        return fields
    # What a salt is derived from is the server's secret, and so is what it makes of it.
    return fields | {"salt": None, "tenant": scope.tenants.name_of_salt(report.salt)}
