"""Orders that take longer than a step: they begin on the engine's thread, and are waited for beside it."""

import asyncio
from collections.abc import Callable

from kvkeep.cache import Purge, PurgeReceipt, Selector, SessionId, SessionReport
from kvkeep.errors import RequestError
from kvkeep.llm import LLM
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Service

__all__ = ["close_session", "purge_to_end", "session_of"]

# Between two looks whether tiers have deleted what was purged.
_PAUSE_S = 0.01


async def purge_to_end(
    service: Service, selector_of: Callable[[LLM], Selector], *, dry_run: bool
) -> PurgeReceipt:
    """Purge, or only count; requests go on while tiers delete."""
    if dry_run:
        return await service.call(lambda llm: llm.cache.purge(selector_of(llm), dry_run=True))
    return await _to_end(service, lambda llm: llm.cache.begin_purge(selector_of(llm)))


async def close_session(
    service: Service, name: str, salt: str | None, *, dry_run: bool
) -> PurgeReceipt:
    """End a session, or only count what would go with it; nothing does when it is not known."""
    if dry_run:
        selector = Selector(sessions=(name,), salts=(salt,))
        return await service.call(lambda llm: llm.cache.purge(selector, dry_run=True))

    def begin(llm: LLM) -> Purge:
        root = llm.engine.namespace(salt).root_key()
        return llm.engine.cache.administration.purges.close_session(SessionId(root, name))

    return await _to_end(service, begin)


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
