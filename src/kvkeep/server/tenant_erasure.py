"""All that is kept of a tenant beside its blocks goes with them."""

from kvkeep.llm import LLM
from kvkeep.server.cache_state import CacheState
from kvkeep.server.service import Service

__all__ = ["erase_kept", "erase_sessions"]


async def erase_kept(service: Service, kept: CacheState, salts: tuple[str | None, ...]) -> None:
    """Leave no response, context or pin of these salts, and no token in the file.

    To be done before their blocks are purged: what is on its way is not kept when it arrives, and what begins
    from now on is no part of the erasure.
    """
    kept.erasures.begin(salts)
    kept.responses.erase(salts)
    for context in list(kept.contexts.all(salts)):
        await kept.forget(context)
    await service.call(lambda llm: _unpin_all(llm, salts))
    await kept.tidy()


async def erase_sessions(service: Service, salts: tuple[str | None, ...]) -> None:
    """Leave no session of these salts without blocks: when those are purged, only new ones have any."""
    await service.call(lambda llm: _end_empty(llm, salts))


def _unpin_all(llm: LLM, salts: tuple[str | None, ...]) -> None:
    roots = {llm.engine.namespace(salt).root_key() for salt in salts}
    for pin in llm.cache.pins():
        if pin.namespace in roots:
            llm.cache.unpin(pin.name)


def _end_empty(llm: LLM, salts: tuple[str | None, ...]) -> None:
    roots = {llm.engine.namespace(salt).root_key() for salt in salts}
    lifetimes = llm.engine.cache.lifetimes
    for session in lifetimes.sessions.all():
        name = session.session_id
        if name.namespace in roots and not any(True for _ in lifetimes.register.of_session(name)):
            lifetimes.end_session(name)
