"""Work for a client that may leave."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from kvkeep.server.errors import ApiError

__all__ = ["ClientLeftError", "unless_disconnected"]

T = TypeVar("T")


class ClientLeftError(ApiError):
    """The client has closed the connection; nobody receives this."""

    def __init__(self) -> None:
        super().__init__(499, "the client closed the connection")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes the connection first.

    `receive` is that of the request, whose body must have been read. Raises ClientLeftError.
    """
    running = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([running, leaving], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientLeftError
    finally:
        for task in (running, leaving):
            task.cancel()
        await asyncio.gather(running, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
