"""AsyncEngine over the bundled model: real steps on a real thread, faults put into the model itself."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kvkeep import LLM, CapacityError, RequestError
from kvkeep.config import SamplingParams
from kvkeep.engine import FinishReason, Piece
from kvkeep.engine.async_engine import AsyncEngine, EngineDownError, Submission
from kvkeep.scheduling import Scheduler, StepPlan
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
    until,
)

_POISON = 2999  # a token that makes the model fail, where a test asks for it


@pytest.fixture
def llm() -> Iterator[LLM]:
    """The bundled model."""
    with LLM("tiny", capacity="64MB") as found:
        yield found


def test_concurrent_requests_get_the_tokens_of_the_engine_alone(llm: LLM) -> None:
    """Eight streams at once give what `generate` gives, in order, none lost, none twice."""
    prompts = [list(range(10 + at, 90 + 3 * at)) for at in range(8)]
    expected = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    llm.cache.clear()

    async def work() -> list[list[Piece]]:
        async with started(llm) as engine:
            return await asyncio.gather(*(pieces_of(engine, ids) for ids in prompts))

    found = run(work)

    assert [tuple(tokens_of(pieces)) for pieces in found] == expected
    for pieces in found:
        assert [piece.receipt is not None for piece in pieces] == [False] * 11 + [True]
        assert pieces[-1].finish_reason is FinishReason.LENGTH


def test_leaving_aborts_within_a_step_and_keeps_finished_blocks(llm: LLM) -> None:
    """A stream that is left gives its lease back, and its prompt is in the cache."""
    ids = list(range(100, 356))

    async def work() -> None:
        async with started(llm) as engine:
            async with engine.submit(ids, LONG, NO_OPTIONS) as submission:
                await anext(submission)
                assert await engine.call(open_leases) == 1
                assert engine.num_open == 1
            assert engine.num_open == 0
            # The order to end it was given before this one.
            assert await engine.call(open_leases) == 0
            again = await pieces_of(engine, ids)
            assert again[-1].receipt is not None
            assert again[-1].receipt.reused_tokens >= 224

    run(work)


def test_cancelling_a_task_ends_its_request(llm: LLM) -> None:
    """What a server does when a client disconnects: the task is cancelled, wherever it is."""

    async def work() -> None:
        async with started(llm) as engine:
            task = asyncio.create_task(pieces_of(engine, list(range(50, 90)), LONG))
            await until(lambda: engine.num_running == 1, "it runs")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await engine.call(open_leases) == 0
            assert engine.num_open == 0

    run(work)


def test_cancelled_waits_lose_no_piece(llm: LLM) -> None:
    """Waiting for the next piece can be cancelled again and again; the tokens are all there."""
    ids = list(range(200, 260))
    params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
    expected = list(llm.generate([ids], params)[0].token_ids)

    async def work() -> list[Piece]:
        pieces = []
        num_cancelled = 0
        async with (
            started(llm) as engine,
            engine.submit(ids, params, NO_OPTIONS) as submission,
        ):
            while True:
                try:
                    pieces.append(await asyncio.wait_for(anext(submission), 0.0002))
                except TimeoutError:
                    num_cancelled += 1
                except StopAsyncIteration:
                    break
        assert num_cancelled, "nothing was cancelled, so nothing was tested"
        return pieces

    assert tokens_of(run(work)) == expected


def test_ready_says_whether_a_piece_is_there(llm: LLM) -> None:
    """False while nothing comes, True with a piece, which is still to be taken, and True at the end."""

    async def work() -> None:
        async with (
            started(llm) as engine,
            engine.submit(list(range(9, 50)), GREEDY, NO_OPTIONS) as submission,
        ):
            assert await submission.ready(SOON_S)
            assert await submission.ready(0)
            assert len([piece async for piece in submission]) == 12
            assert await submission.ready(0)

    run(work)


def test_ready_gives_up_in_time(llm: LLM) -> None:
    """While the thread does something else no piece comes; the request goes on behind it."""

    async def work() -> None:
        async with (
            started(llm) as engine,
            engine.submit(list(range(60, 90)), LONG, NO_OPTIONS) as submission,
        ):
            may_go_on = threading.Event()
            held = asyncio.create_task(engine.call(lambda _: may_go_on.wait(SOON_S)))
            answers = []
            for _ in range(200):
                answers.append(await submission.ready(0.05))
                if not answers[-1]:
                    break
                await anext(submission)
            assert answers[-1] is False
            may_go_on.set()
            assert await submission.ready(SOON_S)
            await held

    run(work)


def test_refused_requests_raise_on_entering(llm: LLM) -> None:
    """The errors of Engine.add come out where the request was made; the engine goes on."""

    async def work() -> None:
        async with started(llm) as engine:
            with pytest.raises(RequestError, match="token id 3072"):
                await pieces_of(engine, [3072])
            with pytest.raises(RequestError, match="0 tokens"):
                await pieces_of(engine, [])
            assert engine.num_open == 0
            assert len(await pieces_of(engine, [5, 6, 7])) == 12

    run(work)


def test_a_request_too_big_for_the_cache_raises_on_entering() -> None:
    """CapacityError says what is missing."""
    with LLM("tiny", capacity="2MB") as llm:

        async def work() -> None:
            async with started(llm) as engine:
                with pytest.raises(CapacityError, match="needs"):
                    await pieces_of(engine, list(range(100, 1100)), LONG)
                assert engine.is_healthy

        run(work)


def poison(llm: LLM) -> None:
    """Let the model fail on every batch that has the poison token."""

    def refuse(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and bool((ids == _POISON).any()):
            raise RuntimeError("the model is poisoned")

    llm.model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_a_failing_step_ends_only_its_own_requests(llm: LLM) -> None:
    """The poisoned request ends with an error, the one that ran before it and the one after do not."""
    poison(llm)

    async def work() -> None:
        async with started(llm) as engine:
            bad = await pieces_of(engine, [5, _POISON, 6])
            assert [piece.finish_reason for piece in bad] == [FinishReason.ERROR]
            assert bad[0].receipt is not None
            good = await pieces_of(engine, [5, 6, 7])
            assert good[-1].finish_reason is FinishReason.LENGTH
            assert engine.is_healthy

    run(work)


def test_many_failing_requests_do_not_bring_the_engine_down(llm: LLM) -> None:
    """More failures in a row than any fixed limit: each step ends somebody, so there is an end."""
    poison(llm)

    async def work() -> None:
        async with started(llm) as engine:
            bad = await asyncio.gather(
                *(pieces_of(engine, [5 + at, _POISON, 6]) for at in range(40))
            )
            assert {pieces[-1].finish_reason for pieces in bad} == {FinishReason.ERROR}
            assert engine.is_healthy

    run(work)


def test_a_failing_thread_refuses_everybody_at_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who wait, those who come, and those who ask questions all get EngineDownError; nobody hangs."""

    async def work() -> None:
        engine = AsyncEngine(llm.engine)
        await engine.start()
        async with engine.submit(list(range(9, 40)), LONG, NO_OPTIONS) as submission:
            await anext(submission)
            waiting = asyncio.create_task(_drain(submission))
            broken = _raise(OSError("the bookkeeping is broken"))
            await engine.call(lambda own: monkeypatch.setattr(own, "step", broken))
            with pytest.raises(EngineDownError, match="bookkeeping is broken"):
                await waiting
        assert not engine.is_healthy
        assert "bookkeeping is broken" in engine.failure
        with pytest.raises(EngineDownError):
            await pieces_of(engine, [1, 2])
        with pytest.raises(EngineDownError):
            await engine.call(lambda _: 1)
        await engine.close()

    run(work)


def test_requests_that_could_wait_for_ever_are_ended(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that plans nothing although nothing runs: clients hear of it, and the engine goes on."""

    async def work() -> None:
        async with started(llm) as engine:
            with monkeypatch.context() as broken:
                broken.setattr(Scheduler, "plan", lambda _: StepPlan((), ()))
                pieces = await pieces_of(engine, [5, 6, 7])
            assert [piece.finish_reason for piece in pieces] == [FinishReason.ABORT]
            assert engine.is_healthy
            assert len(await pieces_of(engine, [5, 6, 7])) == 12

    run(work)


async def _drain(submission: Submission) -> None:
    async for _ in submission:
        pass


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: object) -> Any:  # noqa: ANN401  it never returns
        raise error

    return fail


def test_calls_run_on_the_thread_and_give_results_and_errors(llm: LLM) -> None:
    """`call` gives what the work returns or raises, also while requests run."""

    async def work() -> None:
        async with (
            started(llm) as engine,
            engine.submit(list(range(9, 40)), LONG, NO_OPTIONS) as submission,
        ):
            await anext(submission)
            name = await engine.call(lambda _: threading.current_thread().name)
            assert name == "kvkeep-engine"
            with pytest.raises(ZeroDivisionError):
                await engine.call(lambda _: 1 // 0)
            await anext(submission)

    run(work)


def test_closing_with_time_lets_requests_finish_and_refuses_new_ones(llm: LLM) -> None:
    """Drain: what runs gets its last token, what comes is refused."""

    async def work() -> None:
        engine = AsyncEngine(llm.engine)
        await engine.start()
        async with engine.submit(list(range(9, 40)), GREEDY, NO_OPTIONS) as submission:
            closing = asyncio.create_task(engine.close(drain_s=SOON_S))
            await asyncio.sleep(0)
            assert not engine.is_healthy
            with pytest.raises(EngineDownError):
                await pieces_of(engine, [1, 2])
            pieces = [piece async for piece in submission]
        await closing
        assert pieces[-1].finish_reason is FinishReason.LENGTH
        assert len(tokens_of(pieces)) == 12

    run(work)


def test_closing_without_time_aborts(llm: LLM) -> None:
    """Requests that run get their last piece, with ABORT; then the thread has ended."""

    async def work() -> None:
        engine = AsyncEngine(llm.engine)
        await engine.start()
        async with engine.submit(list(range(9, 40)), LONG, NO_OPTIONS) as submission:
            await anext(submission)
            await engine.close()
            rest = [piece async for piece in submission]
        assert rest[-1].finish_reason is FinishReason.ABORT
        with pytest.raises(EngineDownError):
            await engine.call(lambda _: 1)

    run(work)
    assert llm.cache.stats().open_leases == 0


def test_an_interrupted_request_raises_behind_its_pieces(llm: LLM) -> None:
    """`interrupt` ends a request with an error of the caller's choice."""

    async def work() -> None:
        async with (
            started(llm) as engine,
            engine.submit(list(range(9, 40)), LONG, NO_OPTIONS) as submission,
        ):
            await anext(submission)
            submission.interrupt(TimeoutError("too slow"))
            with pytest.raises(TimeoutError, match="too slow"):
                await _drain(submission)
            assert await engine.call(open_leases) == 0

    run(work)
