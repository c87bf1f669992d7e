"""A whole server under load: many streams, aborts, purges, closed sessions, and a tier that comes and goes.

    make soak SOAK_ARGS="--minutes 10 --streams 200"

Every stream is compared with what the same prompt gave when the server was alone. It ends with 1 when a
stream lost or repeated text, when an answer was an error that nobody asked for, when the bookkeeping is wrong
at the end, or when memory went on growing.
"""

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from time import monotonic

import httpx
import psutil

from benchmarks.harness import RESULTS
from benchmarks.machine import commit, machine_facts
from tests.servers import RedisServer, free_port

_START_S = 120.0
_REQUEST_S = 300.0
_SAMPLE_S = 5.0
# Of the time, what counts as warm-up for memory.
_WARM_UP_SHARE = 0.3
_MOST_GROWTH = 0.10
_NUM_TEXTS = 24
_SENTENCES = (
    "The harbour opens at six and the ferries leave on the half hour.",
    "A refund takes five working days once the parcel has been scanned.",
    "Every sensor writes its reading twice, and the later one is kept.",
    "The museum keeps its maps in the cellar, behind the second door.",
    "Orders above forty are sent without charge to any town by the river.",
    "When the lamp blinks three times the battery is to be changed.",
)


@dataclass(slots=True)
class Tally:
    """What happened; `faults` are what must not."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resident_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A prompt of the soak and the answer that it has."""

    messages: tuple[dict[str, str], ...]
    max_tokens: int
    answer: str = ""


def make_chats(seed: int) -> list[Chat]:
    """Conversations behind a few shared system prompts, of one to five hundred words."""
    rng = random.Random(seed)
    systems = [" ".join(rng.choices(_SENTENCES, k=rng.randint(2, 20))) for _ in range(4)]
    return [
        Chat(
            messages=(
                {"role": "system", "content": rng.choice(systems)},
                {
                    "role": "user",
                    "content": " ".join(rng.choices(_SENTENCES, k=rng.randint(1, 20))),
                },
            ),
            max_tokens=rng.randint(4, 48),
        )
        for _ in range(_NUM_TEXTS)
    ]


@asynccontextmanager
async def running_server(folder: Path, redis_url: str) -> AsyncIterator[tuple[str, psutil.Process]]:
    """`kvkeep serve` with three tiers on a free port: its address and its process."""
    port = free_port()
    command = [
        sys.executable, "-m", "kvkeep.cli.main", "serve", "tiny", "--port", str(port), "--dtype", "float32",
        "--capacity", "48MB", "--tier", "host:48MB", "--tier", f"disk:{folder / 'disk'}:256MB",
        "--tier", redis_url, "--max-queued", "1000",
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # noqa: ASYNC220 - once, at the start
    try:
        url = f"http://127.0.0.1:{port}"
        await _wait_until_ready(url, process, folder / "server.log")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = monotonic() + _START_S
    async with httpx.AsyncClient() as client:
        while monotonic() < until:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}; see {log}")
            try:
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
    raise TimeoutError(f"the server is not ready after {_START_S:g} s")


class Soak:
    """One run: workers that stream, and beside them those who disturb."""

    def __init__(
        self, client: httpx.AsyncClient, chats: Sequence[Chat], seed: int, until_s: float
    ) -> None:
        self._client = client
        self._chats = chats
        self._rng = random.Random(seed)
        self._until_s = until_s
        self.tally = Tally()

    @property
    def is_over(self) -> bool:
        """Whether nothing new is to begin."""
        return monotonic() > self._until_s

    async def stream_on(self, number: int) -> None:
        """One client: chat after chat in a session of its own; some are left in the middle."""
        while not self.is_over:
            chat = self._rng.choice(self._chats)
            leave_after = self._rng.randint(0, 6) if self._rng.random() < 0.15 else None
            try:
                await self._stream(chat, f"s{number}", leave_after)
            except (httpx.HTTPError, json.JSONDecodeError) as error:
                self.tally.faults.append(f"stream: {type(error).__name__}: {error}")

    async def _stream(self, chat: Chat, session: str, leave_after: int | None) -> None:
        body = _body(chat) | {
            "stream": True,
            "kv_cache": {"session": session, "tags": [self._rng.choice("abcdef")], "ttl": "20s"},
        }
        text, num_chunks, is_done = "", 0, False
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                content = (await response.aread()).decode(errors="replace")
                self.tally.faults.append(f"{response.status_code}: {content[:200]}")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_done = True
                    break
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.tally.faults.append(f"in a stream: {chunk['error']}")
                    return
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
                num_chunks += 1
                if leave_after is not None and num_chunks > leave_after:
                    self.tally.counts["left in the middle"] += 1
                    return
        self.tally.counts["streams"] += 1
        if not is_done:
            self.tally.faults.append("a stream ended without [DONE]")
        elif text != chat.answer:
            self.tally.faults.append(f"{text[:80]!r} instead of {chat.answer[:80]!r}")

    async def disturb(self) -> None:
        """Purges by tag, closed sessions, and looks at what there is."""
        while not self.is_over:
            await asyncio.sleep(self._rng.uniform(0.2, 2.0))
            kind = self._rng.choice(["purge", "session", "stats"])
            if kind == "purge":
                tags = {"tags": [self._rng.choice("abcdef")]}
                response = await self._client.post("/v1/cache/purge", json=tags)
            elif kind == "session":
                number = self._rng.randrange(400)
                response = await self._client.delete(f"/v1/cache/sessions/s{number}")
            else:
                response = await self._client.get("/v1/cache")
            self.tally.counts[kind] += 1
            if response.status_code not in (200, 404):
                self.tally.faults.append(f"{kind}: {response.status_code} {response.text[:200]}")

    async def shake(self, server: RedisServer) -> None:
        """The remote tier hangs, dies, and comes back empty."""
        while not self.is_over:
            await asyncio.sleep(self._rng.uniform(2.0, 10.0))
            if self._rng.random() < 0.5:
                server.freeze()
                await asyncio.sleep(self._rng.uniform(0.5, 5.0))
                server.thaw()
                self.tally.counts["server hung"] += 1
            else:
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(self._rng.uniform(0.5, 5.0))
                await asyncio.to_thread(server.start)
                self.tally.counts["server died"] += 1

    async def watch(self, process: psutil.Process) -> None:
        """Sample the server's memory."""
        while not self.is_over:
            self.tally.resident_bytes.append(process.memory_info().rss)
            await asyncio.sleep(_SAMPLE_S)


def _body(chat: Chat) -> dict[str, object]:
    return {
        "model": "tiny",
        "messages": list(chat.messages),
        "max_tokens": chat.max_tokens,
        "temperature": 0,
    }


async def answered(client: httpx.AsyncClient, chats: Sequence[Chat]) -> list[Chat]:
    """The chats with the answers that they have when nothing else runs and nothing is reused."""
    found = []
    for chat in chats:
        body = _body(chat) | {"kv_cache": {"read": False, "write": False}}
        response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        text = response.json()["choices"][0]["message"]["content"] or ""
        found.append(Chat(messages=chat.messages, max_tokens=chat.max_tokens, answer=text))
    return found


async def run(*, minutes: float, streams: int, seed: int, folder: Path) -> Tally:
    """The whole soak; its tally."""
    async with AsyncExitStack() as stack:
        server = stack.enter_context(RedisServer(folder / "redis"))
        url, process = await stack.enter_async_context(running_server(folder, server.url))
        limits = httpx.Limits(max_connections=2 * streams + 10)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=_REQUEST_S, limits=limits)
        )
        chats = await answered(client, make_chats(seed))
        soak = Soak(client, chats, seed, monotonic() + 60 * minutes)
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(soak.stream_on(number))
            group.create_task(soak.disturb())
            group.create_task(soak.shake(server))
            group.create_task(soak.watch(process))
        response = await client.post("/v1/cache/verify", json={"tiers": True})
        problems = response.json().get("problems", response.text)
        if response.status_code != 200 or problems:
            soak.tally.faults.append(f"verify: {problems}")
    return soak.tally


def growth(resident_bytes: Sequence[int]) -> float:
    """Share by which memory at the end is above what it was after the warm-up."""
    warm = resident_bytes[int(_WARM_UP_SHARE * len(resident_bytes)) :]
    part = max(1, len(warm) // 4)
    return mean(warm[-part:]) / mean(warm[:part]) - 1


def report(tally: Tally, command: str) -> str:
    """What happened, for people and for the results."""
    grown = growth(tally.resident_bytes)
    lines = [f"`{command}`", f"{machine_facts()['cpu']}, commit {commit()['commit']}", ""]
    lines += [f"{what}: {count}" for what, count in sorted(tally.counts.items())]
    memory = (
        f"memory of the server: {tally.resident_bytes[0] / 1e6:.0f} MB at first, "
        f"{max(tally.resident_bytes) / 1e6:.0f} MB at most, {grown:+.1%} after the warm-up"
    )
    faults = [f"  {fault}" for fault in tally.faults[:20]]
    lines += [memory, f"faults: {len(tally.faults)}", *faults]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse arguments, run, print, write benchmarks/results/soak.txt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        tally = asyncio.run(
            run(minutes=options.minutes, streams=options.streams, seed=options.seed, folder=folder)
        )
        kept = RESULTS.parent.parent / "build" / "soak-server.log"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "server.log", kept)
    command = " ".join(["python -m benchmarks.soak", *sys.argv[1:]])
    text = report(tally, command)
    print(text)
    (RESULTS / "soak.txt").write_text(text, encoding="utf-8")
    if tally.faults or growth(tally.resident_bytes) > _MOST_GROWTH:
        sys.exit(1)


if __name__ == "__main__":
    main()
