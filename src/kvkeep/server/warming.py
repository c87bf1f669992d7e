"""Prompts of the settings are computed when the model is there, one after another, beside requests."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI
from pydantic import ValidationError

from kvkeep.cache import Receipt
from kvkeep.config.warm import WarmPrompt
from kvkeep.errors import KVKeepError
from kvkeep.llm import LLM
from kvkeep.server.auth import Gate, Tenant, TenantId
from kvkeep.server.cache_context_work import make_context, outlast_sessions
from kvkeep.server.cache_contexts import Context
from kvkeep.server.cache_schemas import ContextRequest
from kvkeep.server.cache_scope import scope_of
from kvkeep.server.cache_state import CacheState, keeping
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service, ServiceState

__all__ = ["keeping_warm"]

_log = logging.getLogger("kvkeep.server.warming")
# Seats and log lines of these requests are nobody's key.
_WARMER = TenantId("settings")
_TOO_MANY = 429
_PAUSE_S = 1.0


@asynccontextmanager
async def keeping_warm(app: FastAPI) -> AsyncIterator[None]:
    """What `keeping` does; and once the model is there, `settings.warm` is computed."""
    service: Service = app.state.service
    gate: Gate = app.state.gate
    async with keeping(app):
        task = asyncio.create_task(_warm_when_loaded(service, app.state.cache, gate.owners))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _warm_when_loaded(service: Service, kept: CacheState, tenants: Sequence[Tenant]) -> None:
    try:
        await service.loaded()
    except Exception:  # noqa: BLE001  the service has logged it
        return
    await kept.restore_quotas()
    try:
        await service.call(lambda llm: _outlast_sessions(llm, list(kept.contexts.all(()))))
        await _warm_all(service, kept, tenants)
    except Exception:  # noqa: BLE001  it ends the task, not the server
        _log.exception("prompts of the settings are not computed")


def _outlast_sessions(llm: LLM, contexts: Sequence[Context]) -> None:
    """Contexts of an earlier run; whoever asks for pins waits until all that tiers have is known."""
    if contexts and llm.settings.session_ttl is not None:
        llm.cache.pins()
        outlast_sessions(llm, contexts)


async def _warm_all(service: Service, kept: CacheState, tenants: Sequence[Tenant]) -> None:
    """For each of the tenants, which have a cache of their own; one that fails costs the others nothing."""
    wanted = [(one, tenant) for tenant in tenants for one in service.settings.warm]
    num_failed = 0
    for number, (one, tenant) in enumerate(wanted, 1):
        if service.state is not ServiceState.READY:
            return  # it stops, or has failed
        what = f"warm {number} of {len(wanted)}: {one.name}"
        try:
            receipt = await _warm(service, kept, one, tenant)
        except (ApiError, KVKeepError, ValidationError) as error:
            num_failed += 1
            _log.warning("%s cannot be computed (%s): %s", what, one.place, _reason(error))
        else:
            _log.info("%s: %s", what, _written(receipt))
    if wanted:
        _log.info("%d of %d warm contexts are there", len(wanted) - num_failed, len(wanted))


async def _warm(service: Service, kept: CacheState, one: WarmPrompt, tenant: Tenant) -> Receipt:
    asked = ContextRequest.model_validate({"name": one.name, **one.fields})
    scope = scope_of(tenant, service.settings)
    while True:
        try:
            return await make_context(
                service,
                scope,
                kept,
                asked,
                tenant=replace(tenant, tenant_id=_WARMER),
                request_id=f"warm-{one.name}",
            )
        except ApiError as error:
            # Requests of clients have taken all seats: they come first.
            if error.status != _TOO_MANY:
                raise
        await asyncio.sleep(_PAUSE_S)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'prompt'}: {one['msg']}" for one in error.errors()
        )
    param = error.param if isinstance(error, ApiError) else None
    return f"{param}: {error}" if param else str(error)


def _written(receipt: Receipt) -> str:
    return (
        f"{receipt.computed_tokens} tokens computed, {receipt.reused_tokens} reused, "
        f"{receipt.total_s:.2f} s"
    )
