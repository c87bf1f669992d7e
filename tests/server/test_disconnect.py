"""Work for a client that may leave: it ends with the client, and what else cancels it stays what it is."""

import asyncio

import pytest
from starlette.types import Message

from kvkeep.server.disconnect import ClientLeftError, unless_disconnected
from tests.async_engines import run


class Client:
    """A client that has sent everything, and leaves when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> Message:
        """As a server's `receive` behind the body."""
        await self.leaves.wait()
        return {"type": "http.disconnect"}


async def _forever() -> None:
    await asyncio.Event().wait()


def test_nobody_watches_behind_the_result() -> None:
    """Work of a client that stays has its result, and no task is left."""

    async def result() -> str:
        await asyncio.sleep(0)
        return "done"

    async def work() -> None:
        before = asyncio.all_tasks()
        assert await unless_disconnected(Client().receive, result()) == "done"
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    run(work)


def test_who_leaves_ends_the_work_and_nothing_else() -> None:
    """The cancellation is used up: the request can still be logged and its seats given back."""

    async def work() -> None:
        client = Client()
        asyncio.get_running_loop().call_soon(client.leaves.set)
        with pytest.raises(ClientLeftError):
            await unless_disconnected(client.receive, _forever())
        worker = asyncio.current_task()
        assert worker is not None
        assert worker.cancelling() == 0
        await asyncio.sleep(0)

    run(work)


@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
def test_a_request_that_is_cancelled_is_not_said_to_have_left(leaves: bool) -> None:
    """A server that stops cancels its requests; it must see them end so, also of clients that leave."""

    async def work() -> None:
        client = Client()
        task = asyncio.create_task(unless_disconnected(client.receive, _forever()))
        await asyncio.sleep(0)
        if leaves:
            client.leaves.set()
            # The work is cancelled in the third turn of the loop; before it ends, somebody else does it too.
            for _ in range(2):
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)


def test_the_errors_of_the_work_are_its_own() -> None:
    """They pass as they are."""

    async def fails() -> None:
        raise ValueError("of the work")

    async def work() -> None:
        with pytest.raises(ValueError, match="of the work"):
            await unless_disconnected(Client().receive, fails())

    run(work)
