"""Questions about all that a tenant has, asked in bits between steps: nobody's decoding waits for one."""

from asyncio import Lock
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


class Inspections:
    """Has questions answered on the engine's thread, of each tenant one at a time.

    Between two steps there is some milliseconds' work on each question, so that an answer may be of slightly
    different moments.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._locks: WeakValueDictionary[TenantId, Lock] = WeakValueDictionary()

    async def ask(self, asker: Tenant, question: Callable[[LLM], Bits[T]]) -> T:
        """The answer to a question. Raises what it raises."""
        lock = self._locks.setdefault(asker.tenant_id, Lock())
        async with lock:
            work = await self._service.call(lambda llm: Sliced(question(llm)))
            while not await self._service.call(lambda _: work.go_on()):
                pass
            return work.result


def inspection_of(llm: LLM) -> Inspection:
    """What looks at the cache of a model, once all is known that its tiers have had at the start."""
    administration = llm.engine.cache.administration
    administration.purges.wait_until_restored()
    return administration.inspection


def query_of(llm: LLM, selector: Selector) -> Query:
    """What a selector means now."""
    cache = llm.engine.cache
    cache.administration.purges.wait_until_restored()
    return selector.resolve(
        lambda salt: llm.engine.namespace(salt).root_key(), cache.lifetimes.clock()
    )
