"""Pieces of a submission that are given away as they come, without waking a task."""

import asyncio
from collections.abc import Iterator

import pytest

from kvkeep import LLM
from kvkeep.engine import Piece
from tests.async_engines import (
    GREEDY,
    LONG,
    NO_OPTIONS,
    SOON_S,
    open_leases,
    pieces_of,
    run,
    started,
    tokens_of,
)


@pytest.fixture
def llm() -> Iterator[LLM]:
    """The bundled model."""
    with LLM("tiny", capacity="64MB") as found:
        yield found


def test_a_sink_and_a_task_get_all_pieces_in_order(llm: LLM) -> None:
    """What the sink does not want waits for the task, and what comes behind it too; the end always does."""
    ids = list(range(300, 360))
    expected = list(llm.generate([ids], GREEDY)[0].token_ids)
    found: list[Piece] = []
    num_sunk = 0

    def sink(piece: Piece) -> bool:
        nonlocal num_sunk
        if len(found) % 4 == 3:
            return False
        num_sunk += 1
        found.append(piece)
        return True

    async def work() -> None:
        async with started(llm) as engine, engine.submit(ids, GREEDY, NO_OPTIONS) as submission:
            submission.divert(sink)
            while await submission.ready(SOON_S):
                pieces = submission.take()
                if not pieces:
                    break
                found.extend(pieces)

    run(work)

    assert tokens_of(found) == expected
    assert 0 < num_sunk < len(expected)
    assert found[-1].receipt is not None


def test_a_sink_that_fails_ends_its_own_request_only(llm: LLM) -> None:
    """Its error is raised where its pieces are taken; the others go on."""

    def sink(piece: Piece) -> bool:
        raise ZeroDivisionError

    async def work() -> None:
        async with started(llm) as engine:
            other = asyncio.create_task(pieces_of(engine, list(range(400, 450))))
            async with engine.submit(list(range(9, 50)), LONG, NO_OPTIONS) as submission:
                submission.divert(sink)
                assert await submission.ready(SOON_S)
                with pytest.raises(ZeroDivisionError):
                    submission.take()
            assert len(await other) == 12
            assert await engine.call(open_leases) == 0

    run(work)
