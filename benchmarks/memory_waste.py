"""How much of the memory that requests hold is not used. No model and no torch."""

import math
import random
from dataclasses import dataclass

from benchmarks.bookkeeping import make_cache, make_chain
from benchmarks.harness import Run, Script
from kvkeep.cache import KVCache
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.scheduling import Request, Scheduler
from kvkeep.spec import RequestId

# Tokens that stand for generated ones; what they are changes nothing.
_GENERATED = 7
_VOCABULARY = 150_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Lengths are log-normal with these means; `at_most[i]` is the target at `block_sizes[i]`."""

    requests: int
    mean_prompt: float
    mean_output: float
    sigma: float
    longest: int
    seats: int
    max_batch_tokens: int
    arena_tokens: int
    system_prompt: int
    block_sizes: tuple[int, ...]
    at_most: tuple[float | None, ...]


@dataclass(slots=True)
class _Load:
    """A request to come: its prompt and how many tokens it will generate."""

    prompt: list[int]
    num_output: int


@dataclass(slots=True)
class _Census:
    """Slots after every step: `unused` of `allocated`, and what other ways would have allocated."""

    unused: list[int]
    allocated: list[int]
    logical: list[int]  # tokens that the running requests see, shared ones once for each
    by_longest: list[int]  # slots if every request reserved the longest context
    by_own_end: list[int]  # slots if every request reserved its own final length
    running: list[int]
    num_preemptions: int = 0


def measure(run: Run, settings: Settings) -> None:
    """The same requests through the real scheduler and ledger, for each block size."""
    loads = _loads(run.seed, settings)
    shared = random.Random(run.seed).choices(range(_VOCABULARY), k=settings.system_prompt)
    for size, at_most in zip(settings.block_sizes, settings.at_most, strict=True):
        census = _simulate(run, settings, size, loads, ())
        _report(run, settings, size, census, at_most)
        with_shared = _simulate(run, settings, size, loads, shared)
        _report_shared(run, settings, size, with_shared)
    mean = [sum(values) / len(loads) for values in zip(*_lengths(loads), strict=True)]
    run.notes += [
        f"{len(loads)} requests of {mean[0]:.0f} prompt and {mean[1]:.0f} output tokens on average",
        f"{settings.seats} requests at once, {settings.max_batch_tokens} tokens a step",
        "sealed blocks that no request holds are reusable memory, not waste",
    ]


def _lengths(loads: list[_Load]) -> list[tuple[int, int]]:
    return [(len(load.prompt), load.num_output) for load in loads]


def _report(
    run: Run, settings: Settings, size: int, census: _Census, at_most: float | None
) -> None:
    allocated, unused = sum(census.allocated), sum(census.unused)
    used = allocated - unused
    name = f"block {size}"
    run.add(
        f"{name}: unused of allocated, all steps together",
        [unused / allocated],
        "share",
        at_most=at_most,
    )
    full = [at for at, running in enumerate(census.running) if 2 * running >= settings.seats]
    full = full or list(range(len(census.running)))
    run.add(
        f"{name}: unused of allocated, each step with half the seats taken",
        [census.unused[at] / census.allocated[at] for at in full],
        "share",
    )
    worst = max(census.unused[at] / census.allocated[at] for at in full)
    run.add(f"{name}: the worst of these steps", [worst], "share")
    run.add(
        f"{name}: had each reserved {settings.longest} tokens",
        [1 - used / sum(census.by_longest)],
        "share",
    )
    run.add(
        f"{name}: had each reserved its own final length",
        [1 - used / sum(census.by_own_end)],
        "share",
    )
    per_sequence = used / sum(census.running)
    half = (size - 1) / 2
    run.notes.append(
        f"{name}: {per_sequence:.0f} tokens a running request, half a block is {half:g} slots: "
        f"{half / (per_sequence + half):.2%} to be expected; {census.num_preemptions} preemptions, "
        f"{len(census.running)} steps"
    )


def _report_shared(run: Run, settings: Settings, size: int, census: _Census) -> None:
    name = f"block {size}, shared prompt of {settings.system_prompt}"
    allocated = sum(census.allocated)
    run.add(f"{name}: unused of allocated", [sum(census.unused) / allocated], "share")
    run.add(
        f"{name}: tokens seen for each slot allocated", [sum(census.logical) / allocated], "times"
    )


def _loads(seed: int, settings: Settings) -> list[_Load]:
    chooser = random.Random(seed)

    def length(mean: float) -> int:
        drawn = chooser.lognormvariate(math.log(mean) - settings.sigma**2 / 2, settings.sigma)
        return max(1, round(drawn))

    loads = []
    room = settings.longest - settings.system_prompt
    for _ in range(settings.requests):
        num_output = min(length(settings.mean_output), room // 2)
        num_prompt = min(length(settings.mean_prompt), room - num_output)
        prompt = chooser.choices(range(_VOCABULARY), k=num_prompt)
        loads.append(_Load(prompt, num_output))
    return loads


def _simulate(
    run: Run, settings: Settings, size: int, loads: list[_Load], shared: list[int] | tuple[()]
) -> _Census:
    cache = make_cache(size, settings.arena_tokens)
    scheduler = Scheduler(
        cache, max_batch_tokens=settings.max_batch_tokens, max_requests=settings.seats
    )
    census = _Census([], [], [], [], [], [])
    running: dict[Request, int] = {}
    coming = iter(enumerate(loads))
    while True:
        while scheduler.num_waiting < settings.seats and (one := next(coming, None)) is not None:
            number, load = one
            chain = make_chain(size, [*shared, *load.prompt])
            params = SamplingParams(max_tokens=load.num_output, temperature=0)
            request = Request(RequestId(number), chain, params, CacheOptions())
            running[request] = len(chain) + load.num_output
            scheduler.add(request)
        plan = scheduler.plan()
        if not plan.work:
            break
        census.num_preemptions += len(plan.preempted)
        for work in plan.work:
            lease = work.request.held_lease()
            cache.commit(lease, work.spans)
            if work.is_last:
                lease.append([_GENERATED])
        _count(census, cache, settings, running)
        for work in plan.work:
            if work.request.num_output >= work.request.params.max_tokens:
                scheduler.finish(work.request)
                del running[work.request]
    report = cache.verify()
    run.check(
        f"block {size}, {len(shared)} shared tokens: every request ended, every invariant holds",
        holds=not running and report.ok and cache.stats().in_use_bytes == 0,
        found=f"({report.blocks_checked} blocks)",
    )
    return census


def _count(
    census: _Census, cache: KVCache, settings: Settings, requests: dict[Request, int]
) -> None:
    """Slots that the requests hold after a step; what has no content yet lies in open last blocks."""
    size = cache.spec.block_size
    unused = logical = num_running = own_end = 0
    for request, final_length in requests.items():
        lease = request.lease
        if lease is None:
            continue
        num_running += 1
        num_held = len(lease.tables[0].blocks) * size
        num_written = min(lease.next_position, num_held)
        unused += num_held - num_written
        logical += num_written
        own_end += final_length
    census.unused.append(unused)
    census.logical.append(logical)
    census.allocated.append(cache.stats().groups[0].in_use * size)
    census.by_longest.append(num_running * settings.longest)
    census.by_own_end.append(own_end)
    census.running.append(num_running)


main = Script(
    name="memory_waste",
    claim="Of the memory that requests hold at most 2.5 % (blocks of 16) or 5 % (of 32) is unused.",
    full=Settings(
        requests=10_000,
        mean_prompt=300,
        mean_output=150,
        sigma=1.0,
        longest=4096,
        seats=64,
        max_batch_tokens=2048,
        arena_tokens=131_072,
        system_prompt=512,
        block_sizes=(16, 32),
        at_most=(0.025, 0.05),
    ),
    quick=Settings(
        requests=60,
        mean_prompt=60,
        mean_output=20,
        sigma=1.0,
        longest=512,
        seats=8,
        max_batch_tokens=256,
        arena_tokens=8192,
        system_prompt=40,
        block_sizes=(16, 32),
        at_most=(None, None),
    ),
    measure=measure,
    uses_torch=False,
)

if __name__ == "__main__":
    main()
