"""The pieces of several jobs as one stream, in the order in which they arrive."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from kvkeep.engine import Piece
from kvkeep.server.jobs import JobStream
from kvkeep.server.openai_output import checked, pieces_of

__all__ = ["Arrival", "arrivals_of"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A piece, and the number of the job it belongs to."""

    number: int
    piece: Piece


async def arrivals_of(
    streams: Sequence[JobStream], keep_alive_s: float
) -> AsyncGenerator[Arrival | None, None]:
    """The pieces of jobs that were entered; None for every `keep_alive_s` in which one says nothing.

    Raises ApiError for outputs that did not end as they should.
    """
    if len(streams) == 1:
        async for piece in pieces_of(streams[0], keep_alive_s):
            yield None if piece is None else Arrival(0, piece)
        return
    waiting = {_ready(stream, keep_alive_s): number for number, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                if not task.result():
                    yield None
                else:
                    piece = checked(await anext(streams[number]))
                    yield Arrival(number, piece)
                    if piece.receipt is not None:
                        continue
                waiting[_ready(streams[number], keep_alive_s)] = number
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def _ready(stream: JobStream, keep_alive_s: float) -> asyncio.Task[bool]:
    return asyncio.create_task(stream.ready(keep_alive_s))
