"""An AsyncEngine over the bundled model, and what tests ask of it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import pytest

from kvkeep import LLM
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import Engine, Piece
from kvkeep.engine.async_engine import AsyncEngine

T = TypeVar("T")

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
NO_OPTIONS = CacheOptions()
SOON_S = 20.0


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run a test's coroutine; a hang is a failure."""

    async def timed() -> T:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(timed())


@asynccontextmanager
async def started(llm: LLM) -> AsyncIterator[AsyncEngine]:
    """An engine that is started, and stopped behind the block."""
    engine = AsyncEngine(llm.engine)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def pieces_of(
    engine: AsyncEngine, ids: Sequence[int], params: SamplingParams = GREEDY
) -> list[Piece]:
    """All pieces of one request."""
    async with engine.submit(ids, params, NO_OPTIONS) as submission:
        return [piece async for piece in submission]


def tokens_of(pieces: Sequence[Piece]) -> list[int]:
    """The tokens of a request with one output."""
    return [token for piece in pieces for token in piece.token_ids]


async def until(holds: Callable[[], object], what: str) -> None:
    """Wait on the loop until it holds."""
    try:
        async with asyncio.timeout(SOON_S):
            while not holds():  # noqa: ASYNC110  nothing tells when it does
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"not within {SOON_S:g} s: {what}")


def open_leases(engine: Engine) -> int:
    """Leases of requests that run."""
    return engine.cache.stats().open_leases
