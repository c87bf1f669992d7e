"""Encoding prompts and compiling grammars: in turns, within a bound, and not for who has left."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import httpx
import pytest

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError
from kvkeep.server.fair_threads import FairThreads
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

ALICE, BERT = (Tenant(TenantId(name), salt=name, is_admin=False) for name in ("alice", "bert"))
KEYS = ("the-key-of-alice", "the-key-of-bert")


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningServer]:
    """One thread encodes the prompts of two tenants."""
    with running_server(api_keys=KEYS, tokenizer_threads=1, max_queued=30) as running:
        yield running


class _Held:
    """Work that waits to be let go, and the names of what was done behind it, in order."""

    def __init__(self) -> None:
        self.may_end = Event()
        self.done: list[str] = []

    def hold(self) -> None:
        self.may_end.wait(10)

    def named(self, name: str) -> Callable[[], None]:
        return lambda: self.done.append(name)


async def _one_thread_is_taken(held: _Held, *, max_waiting: int = 9) -> FairThreads:
    threads = FairThreads(1, "test", max_waiting=max_waiting)
    asyncio.ensure_future(threads.run(ALICE, held.hold))  # noqa: RUF006  ends with the loop
    await asyncio.sleep(0)
    return threads


def test_tenants_take_turns() -> None:
    """Who came late with little is done before who came early with much."""

    async def check() -> list[str]:
        held = _Held()
        threads = await _one_thread_is_taken(held)
        asked = [(ALICE, "a1"), (ALICE, "a2"), (ALICE, "a3"), (BERT, "b1"), (BERT, "b2")]
        work = [asyncio.ensure_future(threads.run(who, held.named(name))) for who, name in asked]
        await asyncio.sleep(0)
        held.may_end.set()
        await asyncio.gather(*work)
        assert threads.num_waiting == 0
        return held.done

    assert asyncio.run(check()) == ["a1", "b1", "a2", "b2", "a3"]


def test_what_is_left_is_not_done() -> None:
    """Its turn goes to the next."""

    async def check() -> list[str]:
        held = _Held()
        threads = await _one_thread_is_taken(held)
        first, second = (
            asyncio.ensure_future(threads.run(ALICE, held.named(name))) for name in "ab"
        )
        await asyncio.sleep(0)
        first.cancel()
        held.may_end.set()
        await second
        return held.done

    assert asyncio.run(check()) == ["b"]


def test_no_thread_is_lost_with_who_leaves_when_the_turn_has_come() -> None:
    """Between being given a thread and hearing of it."""
    waiting: list[asyncio.Future[None]] = []

    class _LeftAtTheTurn(FairThreads):
        def _give_thread(self) -> None:
            super()._give_thread()
            if waiting:
                waiting.pop().cancel()

    async def check() -> int:
        held = _Held()
        threads = _LeftAtTheTurn(1, "test", max_waiting=9)
        holding = asyncio.ensure_future(threads.run(ALICE, held.hold))
        await asyncio.sleep(0)
        waiting.append(asyncio.ensure_future(threads.run(ALICE, held.named("a"))))
        await asyncio.sleep(0)
        held.may_end.set()
        await holding
        assert not held.done
        async with asyncio.timeout(5):
            return await threads.run(BERT, lambda: 7)

    assert asyncio.run(check()) == 7


def test_more_than_is_bearable_is_refused() -> None:
    """429, and what waited already is done."""

    async def check() -> list[str]:
        held = _Held()
        threads = await _one_thread_is_taken(held, max_waiting=1)
        waiting = asyncio.ensure_future(threads.run(ALICE, held.named("a")))
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as refused:
            await threads.run(BERT, held.named("b"))
        assert refused.value.status == 429
        held.may_end.set()
        await waiting
        return held.done

    assert asyncio.run(check()) == ["a"]


def test_a_failure_is_told_and_frees_the_thread() -> None:
    """Also where nobody waits for it any more."""

    async def check() -> None:
        threads = FairThreads(1, "test", max_waiting=1)
        with pytest.raises(ZeroDivisionError):
            await threads.run(ALICE, lambda: 1 // 0)
        left = asyncio.ensure_future(threads.run(ALICE, lambda: 1 // 0))
        await asyncio.sleep(0)
        left.cancel()
        assert await threads.run(BERT, lambda: 7) == 7

    asyncio.run(check())


@contextmanager
def _taken_thread(server: RunningServer) -> Iterator[_Held]:
    """The only thread has work that waits to be let go, at the end of the block at the latest."""
    held = _Held()
    loop = server.http.servers[0].get_loop()
    working = asyncio.run_coroutine_threadsafe(server.service.in_thread(ALICE, held.hold), loop)
    try:
        yield held
    finally:
        held.may_end.set()
        working.result(10)


def _tokenize(server: RunningServer, key: str) -> httpx.Response:
    with server.client(key) as client:
        return client.post("/tokenize", json={"prompt": "some words " * 1000})


def test_much_text_of_one_tenant_does_not_hold_up_another(shared: RunningServer) -> None:
    """Twenty texts wait for the thread, and one of somebody else's is encoded after the first of them."""
    with ThreadPoolExecutor(21) as pool, _taken_thread(shared) as held:
        many: list[Future[httpx.Response]] = [
            pool.submit(_tokenize, shared, KEYS[0]) for _ in range(20)
        ]
        wait_until(lambda: shared.service.num_preparing == 20, "they wait")
        one = pool.submit(_tokenize, shared, KEYS[1])
        wait_until(lambda: shared.service.num_preparing == 21, "the other waits too")
        one.add_done_callback(lambda _: held.named(str(sum(each.done() for each in many)))())
        held.may_end.set()

    assert int(held.done[0]) < 10
    assert {each.result().status_code for each in [*many, one]} == {200}


def test_text_of_clients_that_have_left_is_not_encoded(shared: RunningServer) -> None:
    """What waits for the thread goes with its connection."""
    asked = {"messages": [{"role": "user", "content": "some words"}], "max_tokens": 1}
    with _taken_thread(shared), shared.client(KEYS[0]) as client:
        for path in ("/v1/chat/completions", "/v1/messages"):
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=asked, timeout=0.2)
        wait_until(lambda: not shared.service.num_preparing, "nobody waits")


def test_more_texts_than_may_wait_are_refused(shared: RunningServer) -> None:
    """429 with Retry-After, like a full queue."""
    with ThreadPoolExecutor(31) as pool, _taken_thread(shared):
        many = [pool.submit(_tokenize, shared, KEYS[0]) for _ in range(30)]
        wait_until(lambda: shared.service.num_preparing == 30, "they wait")
        refused = _tokenize(shared, KEYS[1])

    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert {each.result().status_code for each in many} == {200}
