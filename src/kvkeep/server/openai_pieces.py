"""The pieces of several jobs as one stream, in the order in which they arrive."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from kvkeep.engine import Piece
from kvkeep.server.jobs import JobStream
from kvkeep.server.openai_output import batches_of

__all__ = ["Arrival", "arrivals_of"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A piece, and the number of the job it belongs to."""

    number: int
    piece: Piece


async def arrivals_of(
    streams: Sequence[JobStream], keep_alive_s: float
) -> AsyncGenerator[Sequence[Arrival], None]:
    """The pieces of jobs that were entered, those that are there at once; none when a job has none in time.

    Raises ApiError for outputs that did not end as they should.
    """
    if len(streams) == 1:
        async for pieces in batches_of(streams[0], keep_alive_s):
            yield [Arrival(0, piece) for piece in pieces]
        return
    batches = [batches_of(stream, keep_alive_s) for stream in streams]
    waiting = {asyncio.create_task(_next(one)): number for number, one in enumerate(batches)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                found = task.result()
                if found is not None:
                    waiting[asyncio.create_task(_next(batches[number]))] = number
                    yield [Arrival(number, piece) for piece in found]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(batches: AsyncGenerator[Sequence[Piece], None]) -> Sequence[Piece] | None:
    """The next batch; None at the end."""
    return await anext(batches, None)
