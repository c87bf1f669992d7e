"""Orders that take longer than a step: they begin on the engine's thread, and are waited for beside it."""

import asyncio
from collections.abc import Callable

from kvkeep.cache import Purge, PurgeReceipt, Selector, SessionId, SessionReport
from kvkeep.cache.slices import Bits
from kvkeep.errors import RequestError
from kvkeep.llm import LLM
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_inspection import Inspections, query_of
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service

__all__ = ["close_session", "planned_close", "planned_purge", "purge", "session_of"]

# Between two looks whether tiers have deleted what was purged.
_PAUSE_S = 0.01


async def purge(service: Service, selector_of: Callable[[LLM], Selector]) -> PurgeReceipt:
    """Forget what a selector means; requests go on while tiers delete."""
    return await _to_end(service, lambda llm: llm.cache.begin_purge(selector_of(llm)))


async def planned_purge(
    inspections: Inspections, asker: Tenant, selector_of: Callable[[LLM], Selector]
) -> PurgeReceipt:
    """What a purge would forget; requests go on while it is counted."""

    def count(llm: LLM) -> Bits[PurgeReceipt]:
        purges = llm.engine.cache.administration.purges
        return purges.planned(query_of(llm, selector_of(llm)))

    return await inspections.ask(asker, count)


async def close_session(service: Service, name: str, salt: str | None) -> PurgeReceipt:
    """End a session; nothing goes when it is not known."""

    def begin(llm: LLM) -> Purge:
        root = llm.engine.namespace(salt).root_key()
        return llm.engine.cache.administration.purges.close_session(SessionId(root, name))

    return await _to_end(service, begin)


async def planned_close(
    inspections: Inspections, asker: Tenant, name: str, salt: str | None
) -> PurgeReceipt:
    """What would go with a session."""
    selector = Selector(sessions=(name,), salts=(salt,))
    return await planned_purge(inspections, asker, lambda _: selector)


def session_of(name: str, salt: str | None) -> Callable[[LLM], SessionReport]:
    """The question for one session. It raises ApiError 404 where there is none."""

    def find(llm: LLM) -> SessionReport:
        try:
            return llm.cache.session(name, salt=salt)
        except RequestError as error:
            raise ApiError(
                404,
                f"there is no session {name!r:.200}; a session begins with its first request",
                param="session",
                code="unknown",
            ) from error

    return find


async def _to_end(service: Service, begin: Callable[[LLM], Purge]) -> PurgeReceipt:
    purge = await service.call(begin)

    def is_done(llm: LLM) -> bool:
        llm.engine.cache.poll()
        return purge.is_done

    while not await service.call(is_done):  # noqa: ASYNC110 - another thread knows
        await asyncio.sleep(_PAUSE_S)
    return await service.call(lambda _: purge.receipt())
