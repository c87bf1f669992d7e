"""The log's line about the state: when there is one, and what the last one says."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar, cast

from kvkeep import LLM
from kvkeep.server.service import Service
from kvkeep.server.status_line import StatusLine
from tests.async_engines import run

T = TypeVar("T")


def test_the_last_line_says_that_nothing_runs() -> None:
    """A look may come between the end of a request and the end of the step it ended in."""
    engine = SimpleNamespace(num_open=1, num_running=1, num_waiting=0)

    async def call(question: Callable[[LLM], T]) -> T:
        return question(llm)

    async def work() -> None:
        status = StatusLine(cast("Service", SimpleNamespace(engine=engine, call=call)))
        assert (await status.next()).startswith("running 1 ")
        engine.num_open = 0
        assert not await status.next()
        engine.num_running = 0
        assert (await status.next()).startswith("running 0 ")
        assert not await status.next()

    with LLM("tiny", capacity="16MB") as llm:
        run(work)
