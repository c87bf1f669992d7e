"""/metrics, and what fills it: jobs that have ended, and answers over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import kvkeep
from kvkeep.cache import CacheStats, Receipt
from kvkeep.cache.explain import MissType
from kvkeep.engine import FinishReason
from kvkeep.engine.async_engine import EngineDownError
from kvkeep.llm import LLM
from kvkeep.metrics import MEDIA_TYPE, Metrics, Snapshot, Times, reuse_class
from kvkeep.server.auth import admin_of
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Finished, Service, ServiceState, Serving

__all__ = ["ResponseCounter", "count_jobs", "routes", "snapshot_of"]

# A long step keeps a scrape waiting, which has about ten seconds itself.
_CACHE_TIMEOUT_S = 5.0
# One label for all paths that are no route, or there would be as many as clients can think of.
_NO_ROUTE = "other"
# Why blocks are not known any more.
_REMOVALS = (MissType.EVICTED, MissType.EXPIRED, MissType.INVALIDATED, MissType.CORRUPT_REJECTED)


def routes() -> APIRouter:
    """The router of /metrics. From the app's start on it counts the jobs of `app.state.service`."""
    router = APIRouter(lifespan=_counting)

    @router.get("/metrics", tags=["server"], response_class=Response)
    async def metrics(request: Request, service: Serving) -> Response:
        """Counters for Prometheus, as text; docs/metrics.md says what each means."""
        # They tell what everybody does.
        if not service.settings.open_metrics:
            await admin_of(request)
        counted: Metrics = request.app.state.metrics
        text = counted.render(await snapshot_of(service))
        # Not as media_type, to which Starlette would add a second charset.
        return Response(text, headers={"content-type": MEDIA_TYPE})

    return router


@asynccontextmanager
async def _counting(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    app.state.metrics = metrics = Metrics(
        model=service.model_id,
        version=kvkeep.__version__,
        compat=service.settings.metrics_compat,
    )
    observer = partial(count_jobs, service, metrics)
    service.observers.append(observer)
    yield
    service.observers.remove(observer)


def count_jobs(service: Service, metrics: Metrics, finished: Finished) -> None:
    """Enter a job that has ended; with the first two given it is an observer of the service."""
    receipt, reasons = finished.receipt, finished.finish_reasons
    if receipt is None:
        metrics.requests.observe_lost()
        return
    times = Times(
        total_s=finished.total_s,
        # The first piece of a request without output is its end.
        first_token_s=finished.waited_s if receipt.output_tokens else None,
        gaps_s=finished.token_gaps_s,
        queue_s=_queue_s(receipt, finished.waited_s),
        restore_s=receipt.restore_s or None,
        saved_s=receipt.saved_s,
    )
    reason = reasons[0] if reasons else FinishReason.ABORT
    block_size = service.llm.settings.block_size
    reuse = reuse_class(receipt.prompt_tokens, receipt.reused_tokens, block_size)
    metrics.requests.observe(receipt, reason, times, reuse=reuse)
    if receipt.miss is not None:
        metrics.requests.observe_miss(str(receipt.miss.type))


def _queue_s(receipt: Receipt, waited_s: float | None) -> float | None:
    """From the arrival of a request to its first step. It came to the engine between two steps."""
    if receipt.queue_s is None or receipt.first_token_s is None or waited_s is None:
        return receipt.queue_s
    return receipt.queue_s + max(0.0, waited_s - receipt.first_token_s)


async def snapshot_of(service: Service) -> Snapshot:
    """What the service reports of itself now; without the cache when that does not answer in time."""
    is_healthy = service.state is ServiceState.READY
    try:
        engine, llm = service.engine, service.llm
        look = await asyncio.wait_for(service.call(_look), _CACHE_TIMEOUT_S)
    except (ApiError, EngineDownError, TimeoutError):
        return Snapshot(is_healthy=is_healthy, num_running=0, num_waiting=0, cache=None)
    settings = llm.settings
    return Snapshot(
        is_healthy=is_healthy,
        num_running=engine.num_running,
        num_waiting=engine.num_waiting,
        cache=look.stats,
        removed=look.removed,
        num_sessions=look.num_sessions,
        num_pinned=look.num_pinned,
        facts={
            "block_size": str(settings.block_size),
            "num_blocks": str(sum(group.num_blocks for group in look.stats.groups)),
            "kv_format": settings.kv_format,
            "policy": settings.policy,
            "mode": str(llm.installed.paged.mode),
            "max_context": str(llm.installed.max_context),
        },
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """What is asked of the engine's thread, in one go."""

    stats: CacheStats
    removed: dict[str, int]
    num_sessions: int
    num_pinned: int


def _look(llm: LLM) -> _Look:
    history, lifetimes = llm.engine.history, llm.engine.cache.lifetimes
    # Not the reports of pins, which wait until a disk has been read after a start.
    pinned = {
        key for pin in lifetimes.pins for _, keys in lifetimes.register.pinned(pin) for key in keys
    }
    return _Look(
        stats=llm.cache.stats(),
        removed={str(one): history.num_gone(one) for one in _REMOVALS},
        num_sessions=len(lifetimes.sessions),
        num_pinned=len(pinned),
    )


class ResponseCounter:
    """ASGI middleware: counts answers by route and status in `app.state.metrics`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, and count its answer when that begins."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                _count_response(scope, message["status"])
            await send(message)

        await self._app(scope, receive, count_and_send)


def _count_response(scope: Scope, status: int) -> None:
    metrics = getattr(scope["app"].state, "metrics", None)
    path = getattr(scope.get("route"), "path", None)
    if isinstance(metrics, Metrics):
        route = path if isinstance(path, str) else _NO_ROUTE
        metrics.requests.observe_response(route, status)
