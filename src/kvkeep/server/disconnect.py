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
    # The work stays in the task of its caller: another one would cost every request more than watching does.
    worker = asyncio.current_task()
    assert worker is not None
    has_left = False

    def stop_work(leaving: asyncio.Task[None]) -> None:
        nonlocal has_left
        if not leaving.cancelled():
            has_left = True
            worker.cancel()

    leaving = asyncio.ensure_future(_left(receive))
    leaving.add_done_callback(stop_work)
    try:
        return await work
    except asyncio.CancelledError:
        # Somebody else may want the task to end as well.
        if has_left and worker.uncancel() == 0:
            raise ClientLeftError from None
        raise
    finally:
        leaving.remove_done_callback(stop_work)
        leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
