"""What begins and ends with the server: the service, its log lines, and traces where they are wanted."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from kvkeep import __version__
from kvkeep.errors import KVKeepError
from kvkeep.server.errors import ApiError
from kvkeep.server.log_lines import log_job
from kvkeep.server.service import Service
from kvkeep.server.status_line import StatusLine
from kvkeep.server.tracing import RequestTraces, open_provider

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["lifespan_of"]

_log = logging.getLogger("kvkeep.server")


def lifespan_of(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Start the service with the app and close it behind the last request.

    Raises ConfigError where traces are wanted and cannot be sent.
    """
    endpoint = service.settings.otlp_endpoint
    provider = None if endpoint is None else open_provider(endpoint)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with _observed(service, provider):
            await service.start()
            reporting = asyncio.create_task(_report(service))
            try:
                yield
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)
                await service.close()

    return lifespan


@contextmanager
def _observed(service: Service, provider: "TracerProvider | None") -> Iterator[None]:
    """Log every job that ends, and trace it."""
    service.observers.append(log_job)
    if provider is None:
        yield
        return
    traces = RequestTraces(provider, model_id=service.model_id, version=__version__)
    service.observers.append(traces)
    try:
        yield
    finally:
        traces.close()


async def _report(service: Service) -> None:
    """Once the model is there, log a line about the state whenever there is something new."""
    try:
        await service.loaded()
    except Exception:  # noqa: BLE001  the service has logged it
        return
    if not service.settings.status_s:
        return
    status = StatusLine(service)
    while True:
        await asyncio.sleep(service.settings.status_s)
        try:
            line = await status.next()
        except (ApiError, KVKeepError):
            return  # it stops, or has failed
        if line:
            _log.info("%s", line)
