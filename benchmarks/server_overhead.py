"""What HTTP costs over the bare engine: the tokens of many streams, and the first token of one.

Both sides use one engine on one thread: the server's. The clients are another process, on the same cores.
"""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from time import perf_counter

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, greedy_for, make_llm
from kvkeep.config import CacheOptions
from kvkeep.llm import LLM
from tests.running_server import RunningServer, running_server


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`streams` requests at once, of `prompt` tokens, answered with `answered`; then one at a time."""

    shape: str
    streams: int
    prompt: int
    answered: int
    rounds: int
    first_tokens: int
    most_lost: float | None
    most_ms: float | None


@dataclass(frozen=True, slots=True)
class Streamed:
    """What the clients saw of some requests that began together: seconds, and the tokens of each."""

    first_s: float
    total_s: float
    tokens: list[list[int]]


def measure(run: Run, settings: Settings) -> None:
    """Rounds of both sides in turn, each with prompts of its own, the same for both."""
    model = build_model(settings.shape, torch.bfloat16)
    num_tokens = settings.streams * (settings.prompt + settings.answered)
    with (
        make_llm(model, 2 * num_tokens, max_requests=settings.streams) as llm,
        running_server(llm) as server,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients,
    ):
        check_mode(run, llm)
        _compare(run, settings, server, clients)


def _compare(
    run: Run, settings: Settings, server: RunningServer, clients: ProcessPoolExecutor
) -> None:
    _both(run, settings, server, clients, settings.streams, 0)  # warms up
    lost = [
        _both(run, settings, server, clients, settings.streams, number)
        for number in range(1, settings.rounds + 1)
    ]
    ratios = [served.total_s / bare.total_s - 1 for bare, served in lost]
    what = f"{settings.streams} streams of {settings.prompt} + {settings.answered} tokens"
    run.add(f"{what}: longer by", [100 * r for r in ratios], "%", at_most=settings.most_lost)
    run.add(f"{what}: bare engine", [bare.total_s for bare, _ in lost], "s")
    run.add(f"{what}: server", [served.total_s for _, served in lost], "s")
    single = [
        _both(run, settings, server, clients, 1, 1000 + number)
        for number in range(settings.first_tokens)
    ]
    later_ms = [1000 * (served.first_s - bare.first_s) for bare, served in single]
    what = f"first token of {settings.prompt} tokens"
    run.add(f"{what}: later by", later_ms, "ms", at_most=settings.most_ms)
    run.add(f"{what}: bare engine", [bare.first_s for bare, _ in single], "s")
    num_equal = sum(bare.tokens == served.tokens for bare, served in lost)
    run.notes.append(
        f"{num_equal} of {len(lost)} rounds have the same tokens on both sides: in bf16 near-ties may flip "
        "with who else is in a step"
    )
    run.check(
        "alone, every stream has the tokens of the bare engine",
        holds=all(bare.tokens == served.tokens for bare, served in single),
        found=f"{len(single)} streams",
    )


def _both(
    run: Run,
    settings: Settings,
    server: RunningServer,
    clients: ProcessPoolExecutor,
    count: int,
    number: int,
) -> tuple[Streamed, Streamed]:
    """The same prompts on both sides, who takes turns to go first."""
    shape = SHAPES[settings.shape]
    prompts = [
        random_prompt(shape, settings.prompt, (run.seed, number, row)) for row in range(count)
    ]

    def bare() -> Streamed:
        work = server.service.call(lambda llm: _bare(llm, prompts, settings.answered))
        loop = server.service.engine._loop
        assert loop is not None
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    def served() -> Streamed:
        return clients.submit(_served, server.port, prompts, settings.answered).result()

    if number % 2:
        one = bare()
        return one, served()
    other = served()
    return bare(), other


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
    return asyncio.run(_stream_all(port, prompts, num_tokens))


async def _stream_all(port: int, prompts: Sequence[list[int]], num_tokens: int) -> Streamed:
    start = perf_counter()
    streams = await asyncio.gather(*(_stream(port, prompt, num_tokens) for prompt in prompts))
    total_s = perf_counter() - start
    first_s = min(first for first, _ in streams) - start
    return Streamed(first_s, total_s, [tokens for _, tokens in streams])


async def _stream(port: int, prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
    """When the first event came, and the tokens: the least that a client can do."""
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
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    tokens: list[int] = []
    first = 0.0
    async for line in reader:
        if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError((line + await reader.read()).decode(errors="replace")[:500])
        if line.startswith(b"data: {"):
            first = first or perf_counter()
            for choice in json.loads(line[6:])["choices"]:
                tokens += choice.get("token_ids") or []
    writer.close()
    return first, tokens


main = Script(
    name="server_overhead",
    claim="HTTP costs a batch of 32 streams less than 5 %, and a first token less than 3 ms.",
    full=Settings(
        shape="qwen3-0.6b",
        streams=32,
        prompt=32,
        answered=48,
        rounds=4,
        first_tokens=15,
        most_lost=5,
        most_ms=3,
    ),
    quick=Settings(
        shape="micro",
        streams=3,
        prompt=8,
        answered=6,
        rounds=2,
        first_tokens=2,
        most_lost=None,
        most_ms=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
