"""A purge of many blocks by tag: how long it takes, and what a batch that decodes beside it loses."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from benchmarks.harness import Run, Script
from benchmarks.offload import tiers_of
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import EngineSteps, check_mode, make_llm
from kvkeep.blocks import stored_key
from kvkeep.cache import KVCache, Selector
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.llm import LLM
from kvkeep.spec import Span
from kvkeep.tiers import Disk, Host, Remote, Tier, TierSettings
from kvkeep.tiers.base import PutOutcome
from tests.servers import RedisServer

_BLOCK = 32
_TAG = "document:7"
# What an object in a tier holds does not matter here.
_OBJECT = bytes(64)
_ROOM = "4GB"
# About as many as a purge of the device lasts: some are long by themselves, when a thread wakes late.
_USUAL_STEPS = 70


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`blocks` blocks in chains of `chain_blocks`, all tagged, and as many chains that are not.

    A batch of `batch` requests decodes behind `context` tokens of its own meanwhile. First they are on the
    device only, for `rounds` rounds, then in each of `tiers` as well, once.
    """

    shape: str
    blocks: int
    chain_blocks: int
    others: int
    batch: int
    context: int
    rounds: int
    tiers: tuple[str, ...]
    most_s: float | None
    most_longer_ms: float | None


@dataclass(frozen=True, slots=True)
class _Purged:
    """Seconds of a purge, and milliseconds of steps beside it and without one.

    `own_ms` is the cache's longest work between two steps; the rest of a long step is the model's.
    `collected_ms` is the longest collection of garbage by the interpreter meanwhile, which no thread escapes.
    """

    seconds: float
    steps_ms: Sequence[float]
    usual_ms: float
    usual_longest_ms: float
    own_ms: float
    collected_ms: float

    @property
    def longest_ms(self) -> float:
        """By how much the longest step was longer than usual."""
        return max(self.steps_ms) - self.usual_ms

    @property
    def nearly_longest_ms(self) -> float:
        """The same of all but one step in a hundred."""
        return sorted(self.steps_ms)[int(0.99 * (len(self.steps_ms) - 1))] - self.usual_ms


def measure(run: Run, settings: Settings) -> None:
    """Rounds of filling, decoding, purging while the batch goes on."""
    num_tokens = (settings.blocks + settings.others) * _BLOCK
    num_tokens += settings.batch * (settings.context + 8192)
    model = build_model(settings.shape, torch.bfloat16)
    with make_llm(model, num_tokens) as llm:
        check_mode(run, llm)
        gc.collect()
        gc.freeze()  # as a server does
        device = _rounds(run, settings, llm, settings.rounds)
    what = f"purge of {settings.blocks} blocks by tag"
    seconds = [one.seconds for one in device]
    run.add(f"{what}, beside {settings.batch} streams", seconds, "s", at_most=settings.most_s)
    run.add(
        f"{what}: the longest step is longer by",
        [one.longest_ms for one in device],
        "ms",
        at_most=settings.most_longer_ms,
    )
    own = f"{what}: of which the cache's own part is at most"
    run.add(own, [one.own_ms for one in device], "ms")
    run.add(
        f"{what}: 99 of 100 steps are longer by", [one.nearly_longest_ms for one in device], "ms"
    )
    usual = f"a step of {settings.batch} streams without a purge"
    run.add(usual, [one.usual_ms for one in device], "ms")
    what_usual = f"the longest of {_USUAL_STEPS} steps without a purge is longer by"
    run.add(what_usual, [one.usual_longest_ms - one.usual_ms for one in device], "ms")
    run.add(
        f"{what}: the longest collection of garbage", [one.collected_ms for one in device], "ms"
    )
    for kind in settings.tiers:
        with _tier(kind) as tier, make_llm(model, num_tokens, tiers=[tier]) as llm:
            for one in _rounds(run, settings, llm, 1):
                where = f"{what}, on {kind} too"
                run.add(where, [one.seconds], "s")
                run.add(f"{where}: the longest step is longer by", [one.longest_ms], "ms")
                run.add(f"{where}: 99 of 100 are longer by", [one.nearly_longest_ms], "ms")
                run.add(f"{where}: the longest collection of garbage", [one.collected_ms], "ms")


@contextmanager
def _tier(kind: str) -> Iterator[TierSettings]:
    """A tier to which nothing is written but by `_rounds`."""
    with TemporaryDirectory() as folder:
        if kind == "host":
            yield Host(_ROOM, write_on=())
        elif kind == "disk":
            yield Disk(folder, _ROOM, write_on=())
        else:
            with RedisServer(Path(folder)) as server:
                yield Remote(server.url, write_on=(), timeout_s=10.0)


def _rounds(run: Run, settings: Settings, llm: LLM, rounds: int) -> list[_Purged]:
    """So many purges, one after the other."""
    shape, found = SHAPES[settings.shape], list[_Purged]()
    _fill(llm, settings, settings.others, CacheOptions(), (run.seed, "others"))
    prompts = [random_prompt(shape, settings.context, (run.seed, r)) for r in range(settings.batch)]
    batch = EngineSteps(llm, prompts, 8000)
    for number in range(rounds):
        options = CacheOptions(tags=(TagSpan(tag=_TAG),))
        _fill(llm, settings, settings.blocks, options, (run.seed, number))
        usual_ms = _steps_ms(batch, _USUAL_STEPS)
        with _collections_ms() as collections_ms, _polls_ms(llm.engine.cache) as polls_ms:
            start = perf_counter()
            purge = llm.cache.begin_purge(Selector(tags=(_TAG,)))
            steps_ms = [1000 * (perf_counter() - start)]
            while not purge.is_done:
                steps_ms += _steps_ms(batch, 1)
            seconds = perf_counter() - start
        found.append(
            _Purged(
                seconds,
                steps_ms,
                usual_ms=median(usual_ms),
                usual_longest_ms=max(usual_ms),
                own_ms=max(polls_ms),
                collected_ms=max(collections_ms, default=0.0),
            )
        )
        receipt = purge.receipt()
        run.check(
            "a purge forgets all blocks with the tag",
            holds=receipt.deleted == settings.blocks
            and llm.cache.purge(Selector(tags=(_TAG,)), dry_run=True).matched == 0,
            found=receipt,
        )
        run.check(
            "it forgets them in every tier",
            holds=receipt.stored == {tier.name: settings.blocks for tier in _tiers(llm)},
            found=receipt,
        )
        num_known = _num_known(llm, settings, run.seed)
        run.check("it forgets no other", holds=num_known == settings.others, found=num_known)
    batch.close()
    return found


@contextmanager
def _polls_ms(cache: KVCache) -> Iterator[list[float]]:
    """How long the cache works between steps while this is entered."""
    found: list[float] = []

    def poll(*, is_busy: bool = False) -> None:
        start_s = perf_counter()
        KVCache.poll(cache, is_busy=is_busy)
        found.append(1000 * (perf_counter() - start_s))

    cache.poll = poll  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del cache.poll


@contextmanager
def _collections_ms() -> Iterator[list[float]]:
    """How long collections of garbage take while this is entered."""
    found: list[float] = []
    start_s = perf_counter()

    def note(phase: str, _info: Mapping[str, int]) -> None:
        nonlocal start_s
        if phase == "start":
            start_s = perf_counter()
        else:
            found.append(1000 * (perf_counter() - start_s))

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def _steps_ms(batch: EngineSteps, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = perf_counter()
        batch.step()
        found.append(1000 * (perf_counter() - start))
    return found


def _chains(settings: Settings, blocks: int, seed: object) -> list[list[int]]:
    """Prompts of full blocks, together so many."""
    shape, num_tokens = SHAPES[settings.shape], settings.chain_blocks * _BLOCK
    return [
        random_prompt(shape, num_tokens, (seed, at))
        for at in range(blocks // settings.chain_blocks)
    ]


def _fill(llm: LLM, settings: Settings, blocks: int, options: CacheOptions, seed: object) -> None:
    """Make so many blocks known without computing them: their content does not matter here."""
    cache = llm.engine.cache
    tiers, parts = _tiers(llm), (memoryview(_OBJECT),)
    for ids in _chains(settings, blocks, seed):
        chain = llm.engine.chain(ids)
        claim = cache.open_claim(options, chain)
        lease = cache.reserve(chain, read=False, claim=claim)
        assert lease is not None
        spans = [Span(0, len(ids))]
        assert cache.extend(lease, spans)
        cache.commit(lease, spans)
        lease.release()
        if claim is not None:
            cache.close_claim(claim, chain)
        for key in chain.keys if tiers else ():
            labels = cache.lifetimes.register.encoded(key)
            for tier in tiers:
                outcome = tier.put(stored_key(key, 0), parts, len(_OBJECT), labels)
                assert outcome is PutOutcome.STORED


def _tiers(llm: LLM) -> Sequence[Tier]:
    return tiers_of(llm) if llm.engine.cache.stats().tiers else ()


def _num_known(llm: LLM, settings: Settings, seed: int) -> int:
    """Blocks of the chains without tag that are still there."""
    chains = _chains(settings, settings.others, (seed, "others"))
    cache = llm.engine.cache
    gaps = [sum(map(len, cache.gaps(llm.engine.chain(ids)))) for ids in chains]
    # The last token of a known prompt is computed all the same.
    return sum(settings.chain_blocks for gap in gaps if gap == 1)


main = Script(
    name="purge_speed",
    claim="100,000 blocks are purged by tag in less than a second, and nobody's stream stands still.",
    full=Settings(
        shape="micro",
        blocks=100_000,
        chain_blocks=100,
        others=10_000,
        batch=4,
        context=128,
        rounds=5,
        tiers=("host", "disk", "redis"),
        most_s=1.0,
        most_longer_ms=10,
    ),
    quick=Settings(
        shape="micro",
        blocks=60,
        chain_blocks=6,
        others=12,
        batch=2,
        context=40,
        rounds=2,
        tiers=("host", "disk", "redis"),
        most_s=None,
        most_longer_ms=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
