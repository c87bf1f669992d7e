"""What the routes of the cache keep between requests, for as long as the app runs."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Annotated

from fastapi import Depends, FastAPI, Request

from kvkeep.server.cache_contexts import ContextBook
from kvkeep.server.events import EventFeed
from kvkeep.server.service import Finished, Service

__all__ = ["CacheState", "FirstTokenTimes", "Kept", "keeping"]

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
    """Contexts, the feed of events, and times of the requests so far."""

    def __init__(self, service: Service) -> None:
        self.contexts = ContextBook()
        self.events = EventFeed(service)
        self.times = FirstTokenTimes()


@asynccontextmanager
async def keeping(app: FastAPI) -> AsyncIterator[None]:
    """From the app's start to its end there is a CacheState that sees every job end."""
    service: Service = app.state.service
    app.state.cache = state = CacheState(service)
    observers = [state.events.observe, state.times.observe]
    service.observers.extend(observers)
    yield
    for observer in observers:
        service.observers.remove(observer)


def _kept(request: Request) -> CacheState:
    state = request.app.state.cache
    assert isinstance(state, CacheState)
    return state


# A parameter of routes: what they keep.
Kept = Annotated[CacheState, Depends(_kept)]
