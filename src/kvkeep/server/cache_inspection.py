"""Questions about all that a tenant has, asked in bits between steps: nobody's decoding waits for one."""

from asyncio import Lock, sleep
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakValueDictionary

from kvkeep.cache import Query, Selector
from kvkeep.cache.inspection import Inspection
from kvkeep.cache.slices import Bits, Sliced
from kvkeep.llm import LLM
from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.service import Service

__all__ = ["Inspections", "Question", "inspection_of", "query_of"]

T = TypeVar("T")
Question = Callable[[LLM], Bits[T]]

# How often it is looked whether all labels are known: to wait for them would hold up the engine.
_RESTORING_S = 0.02


class Inspections:
    """Has questions answered on the engine's thread, of each tenant one at a time.

    They begin once all is known that tiers have had at the start. Between two steps there is some
    milliseconds' work on each, so that an answer may be of slightly different moments.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._locks: WeakValueDictionary[TenantId, Lock] = WeakValueDictionary()

    async def ask(self, asker: Tenant, question: Callable[[LLM], Bits[T]]) -> T:
        """The answer to a question. Raises what it raises."""
        lock = self._locks.setdefault(asker.tenant_id, Lock())
        async with lock:
            while not await self._service.call(_is_restored):  # noqa: ASYNC110  the engine has no events
                await sleep(_RESTORING_S)
            work = await self._service.call(lambda llm: Sliced(question(llm)))
            while not await self._service.call(lambda _: work.go_on()):
                pass
            return work.result


def inspection_of(llm: LLM) -> Inspection:
    """What looks at the cache of a model."""
    return llm.engine.cache.administration.inspection


def query_of(llm: LLM, selector: Selector) -> Query:
    """What a selector means now."""
    now_s = llm.engine.cache.lifetimes.clock()
    return selector.resolve(lambda salt: llm.engine.namespace(salt).root_key(), now_s)


def _is_restored(llm: LLM) -> bool:
    return llm.engine.cache.administration.purges.is_restored
