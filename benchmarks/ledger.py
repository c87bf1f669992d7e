"""What the bookkeeping of one long request costs, part by part. No model and no torch."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, thread_time

from benchmarks.bookkeeping import make_cache, make_chain
from benchmarks.harness import Run, Script, alternate
from kvkeep.cache import KVCache
from kvkeep.spec import Span

_PARTS = ("chain", "coverage", "reserve", "extend", "commit", "release")
_COUNTED = ("coverage", "reserve", "extend", "commit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A request of `tokens` tokens; `at_most_ms` for its coverage, reserve, extend and commit."""

    tokens: int
    block_size: int
    chunk: int
    rounds: int
    at_most_ms: float | None


@dataclass(slots=True)
class _Lap:
    """Seconds of each part of one request, and processor time of all that are counted."""

    seconds: dict[str, float]
    own_s: float = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start, own_start = perf_counter(), thread_time()
        yield
        if name in _COUNTED:
            self.own_s += thread_time() - own_start
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def counted(self) -> float:
        return sum(self.seconds[part] for part in _COUNTED)


def measure(run: Run, settings: Settings) -> None:
    """A request that nobody knows and the same one again, in turn."""
    _check(run, settings)
    cold, warm = _in_turn(run, settings, "", at_most_ms=settings.at_most_ms)
    for kind, laps in (("cold", cold), ("warm", warm)):
        for part in _PARTS:
            run.add(f"{kind}: {part}", [lap.seconds[part] * 1e3 for lap in laps], "ms")
    _full_arena(run, settings)
    with _no_collections():
        _in_turn(run, settings, ", without garbage collection")
    run.notes += [
        "cold and warm are coverage + reserve + extend + commit; chain is packing and hashing the tokens",
        "the garbage collector runs as it does in Python by default, except where it says otherwise",
        "reported in the issue for vLLM 0.32, under load: 10.6 ms cold, 8.7 ms warm; not measured here",
    ]


def _in_turn(
    run: Run, settings: Settings, suffix: str, *, at_most_ms: float | None = None
) -> tuple[list[_Lap], list[_Lap]]:
    size = settings.block_size
    cache = make_cache(size, settings.tokens + size)
    cold: list[_Lap] = []
    warm: list[_Lap] = []

    def first(number: int) -> float:
        cache.clear()
        cold.append(_request(cache, settings, _tokens(run.seed, settings, number)))
        return cold[-1].counted()

    def again(number: int) -> float:
        warm.append(_request(cache, settings, _tokens(run.seed, settings, number)))
        return warm[-1].counted()

    paired = alternate(first, again, rounds=settings.rounds, warmups=2, flips=False)
    what = f"of {settings.tokens} tokens{suffix}"
    run.add(f"cold request {what}", [s * 1e3 for s in paired.first_s], "ms", at_most=at_most_ms)
    run.add(f"warm request {what}", [s * 1e3 for s in paired.second_s], "ms", at_most=at_most_ms)
    for kind, laps in (("cold", cold[2:]), ("warm", warm[2:])):
        own_ms = [lap.own_s * 1e3 for lap in laps]
        run.add(f"{kind} request, processor time{suffix}", own_ms, "ms")
    return cold[2:], warm[2:]


def _full_arena(run: Run, settings: Settings) -> None:
    """Cold requests when every block must be evicted first, and when they come in chunks."""
    size = settings.block_size
    cache = make_cache(size, settings.tokens + size)
    whole, chunked = [], []
    for number in range(settings.rounds + 1):
        tokens = _tokens(run.seed, settings, -1 - number)
        lap = _request(cache, settings, tokens)
        lap_in_chunks = _request(cache, settings, tokens[::-1], chunk=settings.chunk)
        if number:
            whole.append(lap.counted() * 1e3)
            chunked.append(lap_in_chunks.counted() * 1e3)
    run.add("cold request, every block evicted from another", whole, "ms")
    run.add(f"the same in steps of {settings.chunk} tokens", chunked, "ms")


def _request(
    cache: KVCache, settings: Settings, tokens: list[int], *, chunk: int | None = None
) -> _Lap:
    """Everything the cache does for a request, in as many steps as it has chunks."""
    lap = _Lap({})
    with lap.part("chain"):
        chain = make_chain(settings.block_size, tokens)
    with lap.part("coverage"):
        cache.coverage(chain)
    with lap.part("reserve"):
        lease = cache.reserve(chain)
    assert lease is not None
    while lease.gaps:
        gap = lease.gaps[0]
        spans = (Span(gap.start, min(gap.stop, gap.start + (chunk or len(gap)))),)
        with lap.part("extend"):
            has_room = cache.extend(lease, spans)
        assert has_room
        with lap.part("commit"):
            cache.commit(lease, spans)
    with lap.part("release"):
        lease.release()
    return lap


def _check(run: Run, settings: Settings) -> None:
    size = settings.block_size
    cache, tokens = make_cache(size, settings.tokens + size), _tokens(run.seed, settings, 0)
    _request(cache, settings, tokens)
    num_cold = cache.stats().computed_tokens
    _request(cache, settings, tokens)
    num_warm = cache.stats().computed_tokens - num_cold
    report = cache.verify()
    run.check(
        "a cold request computes every token, a warm one the last, and every invariant holds",
        holds=num_cold == settings.tokens and num_warm == 1 and report.ok,
        found=f"({report.blocks_checked} blocks)",
    )


@contextmanager
def _no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tokens(seed: int, settings: Settings, number: int) -> list[int]:
    chooser = random.Random(f"{seed}:{number}")
    return [chooser.randrange(150_000) for _ in range(settings.tokens)]


main = Script(
    name="ledger",
    claim="The bookkeeping of a request of 32,768 tokens takes at most 5 ms, cold and warm.",
    full=Settings(tokens=32768, block_size=32, chunk=2048, rounds=60, at_most_ms=5.0),
    quick=Settings(tokens=1024, block_size=32, chunk=256, rounds=3, at_most_ms=None),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
