"""What the routes of the cache keep between requests, for as long as the app runs."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from statistics import median
from typing import Annotated, TypeVar

from fastapi import Depends, FastAPI, Request

from kvkeep.errors import KVKeepError
from kvkeep.llm import LLM
from kvkeep.server.auth import Gate, Tenant
from kvkeep.server.cache_contexts import Context, ContextBook
from kvkeep.server.cache_erasures import Erasures, Watch
from kvkeep.server.cache_inspection import Inspections
from kvkeep.server.context_file import ContextFile
from kvkeep.server.events import EventFeed
from kvkeep.server.quota_file import KeptQuota, QuotaFile
from kvkeep.server.responses_history import ResponseHistory
from kvkeep.server.service import Finished, Service
from kvkeep.server.tenants import Tenants
from kvkeep.spec import BlockKey

__all__ = ["CacheState", "FirstTokenTimes", "Kept", "keeping"]

T = TypeVar("T")

_log = logging.getLogger("kvkeep.server")
_MOST_SAMPLES = 64
# Of fewer tokens the time to the first one says more about the queue than about computing.
_LEAST_TOKENS = 16


class FirstTokenTimes:
    """How long the first token has taken lately, by computed prompt token."""

    def __init__(self) -> None:
        self._seconds_per_token: deque[float] = deque(maxlen=_MOST_SAMPLES)

    def observe(self, finished: Finished) -> None:
        """Take a job that has ended: an observer of the service."""
        receipt = finished.receipt
        if receipt is None or receipt.first_token_s is None:
            return
        if receipt.computed_tokens >= _LEAST_TOKENS:
            self._seconds_per_token.append(receipt.first_token_s / receipt.computed_tokens)

    def estimate_ms(self, num_missing: int) -> float | None:
        """Milliseconds to the first token where so many are to be computed; None without samples."""
        if not self._seconds_per_token:
            return None
        return round(median(self._seconds_per_token) * max(1, num_missing) * 1e3, 1)


class CacheState:
    """Contexts, responses, tenants, the feed of events, and times of the requests so far."""

    def __init__(self, service: Service, tenants: Sequence[Tenant] = ()) -> None:
        self.events = EventFeed(service)
        self.times = FirstTokenTimes()
        self.inspections = Inspections(service)
        # Reading tiers may take minutes, in which the same tenant looks at lists.
        self.checks = Inspections(service)
        self.tenants = Tenants(tenants, self._root_of)
        self.responses = ResponseHistory()
        self.erasures = Erasures()
        self._num_tenants = max(1, len(tenants))
        self._service = service
        path = service.settings.contexts_file
        self._file = None if path is None else ContextFile(path)
        quotas_path = service.settings.quotas_file
        self._quotas = None if quotas_path is None else QuotaFile(quotas_path)
        # One thread, so that changes are written in their order.
        self._writer = ThreadPoolExecutor(1, "kvkeep-contexts")
        self._contexts: ContextBook | None = None

    @property
    def contexts(self) -> ContextBook:
        """The contexts of the model, at first those of its last time. ApiError 503 while it is loading."""
        if self._contexts is None:
            book, model = ContextBook(num_tenants=self._num_tenants), self._model
            for one in [] if self._file is None else self._file.load(model):
                book.put(one)
            self._contexts = book
        return self._contexts

    def watch(self, tenant: Tenant, salt: str | None) -> Watch:
        """Look out for an erasure of what a tenant has under a salt, which is its own from now on."""
        self.tenants.learn(tenant, salt)
        return self.erasures.watch(salt)

    async def keep(self, context: Context) -> Context:
        """Enter a context, which is returned as it is there; it is written down by then."""
        context = self.contexts.put(context)
        if self._file is not None:
            await self._write(self._file.put, context)
        return context

    async def renew(self, context: Context) -> bool:
        """Enter another form of a context; False, and nothing is entered, where it was removed meanwhile."""
        known = self.contexts.find(context.salt, context.name)
        if known is None or known.created_at != context.created_at:
            return False
        await self.keep(context)
        return True

    async def forget(self, context: Context) -> None:
        """Take out a context."""
        self.contexts.remove(context.salt, context.name)
        if self._file is not None:
            await self._write(self._file.remove, context)

    async def tidy(self) -> None:
        """Take contexts that were forgotten out of their file as well."""
        if self._file is not None:
            await self._in_writer(self._file.tidy)

    async def keep_quota(self, quota: KeptQuota) -> None:
        """Write down a quota that was set."""
        if self._quotas is not None:
            await self._in_writer(self._quotas.put, quota)

    async def lift_quota(self, salt: str, tier: str | None) -> None:
        """Write down that there is no such quota any more."""
        if self._quotas is not None:
            await self._in_writer(self._quotas.remove, salt, tier)

    async def restore_quotas(self) -> None:
        """Set the quotas of an earlier run; one on a tier that is gone is kept for when it comes back."""
        for one in [] if self._quotas is None else await self._in_writer(self._quotas.load):
            try:
                await self._service.call(partial(_set_quota, quota=one))
            except KVKeepError as error:
                _log.warning("a quota of %d bytes is not in force: %s", one.limit_bytes, error)

    async def close(self) -> None:
        """Come to an end with the files."""
        await self.tidy()
        if self._quotas is not None:
            await self._in_writer(self._quotas.tidy)
        self._writer.shutdown(wait=False)

    def _root_of(self, salt: str) -> BlockKey:
        return self._service.llm.engine.namespace(salt).root_key()

    @property
    def _model(self) -> str:
        return self._service.llm.installed.namespace.model

    async def _write(self, change: Callable[[str, Context], None], context: Context) -> None:
        await self._in_writer(change, self._model, context)

    async def _in_writer(self, work: Callable[..., T], *given: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *given)


def _set_quota(llm: LLM, quota: KeptQuota) -> None:
    llm.cache.set_quota(quota.salt, quota.limit_bytes, tier=quota.tier)


@asynccontextmanager
async def keeping(app: FastAPI) -> AsyncIterator[None]:
    """From the app's start to its end there is a CacheState that sees every job end."""
    service: Service = app.state.service
    gate: Gate = app.state.gate
    app.state.cache = state = CacheState(service, gate.tenants)
    observers = [state.events.observe, state.times.observe, state.tenants.observe]
    service.observers.extend(observers)
    service.begin_observers.append(state.tenants.begin)
    yield
    service.begin_observers.remove(state.tenants.begin)
    for observer in observers:
        service.observers.remove(observer)
    await state.close()


def _kept(request: Request) -> CacheState:
    state = request.app.state.cache
    assert isinstance(state, CacheState)
    return state


# A parameter of routes: what they keep.
Kept = Annotated[CacheState, Depends(_kept)]
