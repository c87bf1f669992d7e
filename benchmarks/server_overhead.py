"""What HTTP costs over the bare engine: the tokens of many streams, and the first token of one.

Both sides use one engine on one thread: the server's. The clients are another process, on the same cores.
"""

import asyncio
import json
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from socket import create_connection
from time import perf_counter, thread_time
from typing import Any, TypeVar

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, greedy_for, make_llm
from kvkeep.config import CacheOptions
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server

T = TypeVar("T")

_EVENT = b"data: {"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`streams` requests at once, of `prompt` tokens, answered with `answered`; then singles, one at a time.

    Of a single the first token counts; `single_answered` are compared. A few of the model's layers, whose
    step varies by less than what is asked for, decide on the first token; the whole model is for the record.
    """

    shape: str
    streams: int
    prompt: int
    answered: int
    rounds: int
    singles: int
    few_layers: int
    few_layers_singles: int
    single_answered: int
    most_lost: float | None
    most_ms: float | None


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the clients saw of some requests that began together: seconds, and the tokens of each."""

    first_s: float
    total_s: float
    tokens: list[list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The same requests on both sides; `loop_s` is CPU time of the server's own thread."""

    bare: Streamed
    served: Streamed
    loop_s: float


def measure(run: Run, settings: Settings) -> None:
    """Both sides in turn, each time with prompts of its own, the same for both."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients:
        with _sides(run, settings, None, clients) as sides:
            _compare_streams(run, settings, sides)
            first_ms = _compare_singles(run, settings, sides, settings.singles, "whole model")
            run.add("first token, whole model: later by", first_ms, "ms")
        name = f"{settings.few_layers} layers"
        with _sides(run, settings, settings.few_layers, clients) as sides:
            first_ms = _compare_singles(run, settings, sides, settings.few_layers_singles, name)
            run.add(f"first token, {name}: later by", first_ms, "ms", at_most=settings.most_ms)


@contextmanager
def _sides(
    run: Run, settings: Settings, num_layers: int | None, clients: ProcessPoolExecutor
) -> "Iterator[_Sides]":
    model = build_model(settings.shape, torch.bfloat16, num_layers)
    num_tokens = settings.streams * (settings.prompt + settings.answered)
    with (
        make_llm(model, 2 * num_tokens, max_requests=settings.streams) as llm,
        running_server(llm) as server,
    ):
        check_mode(run, llm)
        sides = _Sides(run, settings, server, clients)
        sides.both(settings.streams, settings.single_answered, 0)  # warms up
        yield sides


def _compare_streams(run: Run, settings: Settings, sides: "_Sides") -> None:
    rounds = [
        sides.both(settings.streams, settings.answered, number)
        for number in range(1, settings.rounds + 1)
    ]
    lost = [100 * (one.served.total_s / one.bare.total_s - 1) for one in rounds]
    num_tokens = settings.streams * settings.answered
    what = f"{settings.streams} streams of {settings.prompt} + {settings.answered} tokens"
    run.add(f"{what}: longer by", lost, "%", at_most=settings.most_lost)
    run.add(f"{what}: bare engine", [one.bare.total_s for one in rounds], "s")
    run.add(f"{what}: server", [one.served.total_s for one in rounds], "s")
    loop_us = [1e6 * one.loop_s / num_tokens for one in rounds]
    run.add(f"{what}: CPU of the server's thread for a token", loop_us, "us")
    num_equal = sum(one.bare.tokens == one.served.tokens for one in rounds)
    run.notes.append(
        f"{num_equal} of {len(rounds)} rounds have the same tokens on both sides: in bf16 near-ties may flip "
        "with who else is in a step"
    )


def _compare_singles(
    run: Run, settings: Settings, sides: "_Sides", count: int, name: str
) -> list[float]:
    """By how many milliseconds the first token came later, each time."""
    singles = [sides.both(1, settings.single_answered, 1000 + number) for number in range(count)]
    run.check(
        f"alone, every stream has the tokens of the bare engine ({name})",
        holds=all(one.bare.tokens == one.served.tokens for one in singles),
        found=f"{len(singles)} streams",
    )
    bare_ms = [1000 * one.bare.first_s for one in singles]
    run.add(f"first token, {name}: bare engine", bare_ms, "ms")
    return [1000 * (one.served.first_s - one.bare.first_s) for one in singles]


class _Sides:
    """The bare engine and the server, which take turns to go first."""

    def __init__(
        self, run: Run, settings: Settings, server: RunningServer, clients: ProcessPoolExecutor
    ) -> None:
        loop = server.service.engine._loop
        assert loop is not None
        self._loop = loop
        self._shape = SHAPES[settings.shape]
        self._num_prompt = settings.prompt
        self._seed = run.seed
        self._server = server
        self._clients = clients

    def both(self, count: int, num_tokens: int, number: int) -> Compared:
        """The same `count` prompts on both sides, answered with `num_tokens` each."""
        prompts = [
            random_prompt(self._shape, self._num_prompt, (self._seed, number, row))
            for row in range(count)
        ]
        bare = self._bare(prompts, num_tokens) if number % 2 else None
        before_s = self._on_loop(_thread_time())
        served = self._clients.submit(_served, self._server.port, prompts, num_tokens).result()
        loop_s = self._on_loop(_thread_time()) - before_s
        bare = bare or self._bare(prompts, num_tokens)
        return Compared(bare=bare, served=served, loop_s=loop_s)

    def _bare(self, prompts: Sequence[list[int]], num_tokens: int) -> Streamed:
        return self._on_loop(self._server.service.call(lambda llm: _bare(llm, prompts, num_tokens)))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _thread_time() -> float:
    return thread_time()


def _bare(llm: LLM, prompts: Sequence[list[int]], num_tokens: int) -> Streamed:
    """The engine's own loop, on its thread."""
    start, first_s = perf_counter(), 0.0
    options = CacheOptions(read=False, write=False)
    ids = [llm.engine.add(prompt, greedy_for(num_tokens), options) for prompt in prompts]
    id_to_tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while llm.engine.has_work:
        for piece in llm.engine.step():
            first_s = first_s or perf_counter() - start
            id_to_tokens[piece.request_id] += piece.token_ids
    return Streamed(first_s, perf_counter() - start, list(id_to_tokens.values()))


def _served(port: int, prompts: Sequence[list[int]], num_tokens: int) -> Streamed:
    """In the clients' process: all streams at once."""
    bodies = [_request(prompt, num_tokens) for prompt in prompts]
    return asyncio.run(_stream_all(port, bodies)) if len(bodies) > 1 else _stream_one(port, *bodies)


def _stream_one(port: int, request: bytes) -> Streamed:
    """A single waits in a plain socket: the time of an event loop that wakes up is not the server's."""
    start, first_s = perf_counter(), 0.0
    tokens: list[int] = []
    with create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as answer:
        connection.sendall(request)
        for line in answer:
            _refuse_error(line)
            if line.startswith(_EVENT):
                first_s = first_s or perf_counter() - start
                tokens += _tokens(line)
    return Streamed(first_s, perf_counter() - start, [tokens])


async def _stream_all(port: int, requests: Sequence[bytes]) -> Streamed:
    start = perf_counter()
    streams = await asyncio.gather(*(_stream(port, request) for request in requests))
    total_s = perf_counter() - start
    first_s = min(first for first, _ in streams) - start
    return Streamed(first_s, total_s, [tokens for _, tokens in streams])


async def _stream(port: int, request: bytes) -> tuple[float, list[int]]:
    """When the first event came, and the tokens: the least that a client can do."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    tokens: list[int] = []
    first = 0.0
    async for line in reader:
        _refuse_error(line)
        if line.startswith(_EVENT):
            first = first or perf_counter()
            tokens += _tokens(line)
    writer.close()
    return first, tokens


def _request(prompt: list[int], num_tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "kv_cache": {"read": False, "write": False},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _refuse_error(line: bytes) -> None:
    if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
        raise RuntimeError(line.decode(errors="replace"))


def _tokens(line: bytes) -> list[int]:
    choices = json.loads(line.removeprefix(b"data: "))["choices"]
    return [token for choice in choices for token in choice.get("token_ids") or []]


main = Script(
    name="server_overhead",
    claim="HTTP costs a batch of 32 streams less than 5 %, and a first token less than 3 ms.",
    full=Settings(
        shape="qwen3-0.6b",
        streams=32,
        prompt=32,
        answered=32,
        rounds=8,
        singles=20,
        few_layers=4,
        few_layers_singles=120,
        single_answered=4,
        most_lost=5,
        most_ms=3,
    ),
    quick=Settings(
        shape="micro",
        streams=3,
        prompt=8,
        answered=6,
        rounds=2,
        singles=2,
        few_layers=1,
        few_layers_singles=2,
        single_answered=3,
        most_lost=None,
        most_ms=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
