"""A purge of many blocks by tag: how long it takes, and what a batch that decodes beside it loses."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import EngineSteps, check_mode, make_llm
from kvkeep.cache import Selector
from kvkeep.config import CacheOptions, TagSpan
from kvkeep.llm import LLM
from kvkeep.spec import Span

_BLOCK = 32
_TAG = "document:7"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`blocks` blocks in chains of `chain_blocks`, all tagged, and as many chains that are not.

    A batch of `batch` requests decodes behind `context` tokens of its own meanwhile.
    """

    shape: str
    blocks: int
    chain_blocks: int
    others: int
    batch: int
    context: int
    rounds: int
    most_s: float | None
    most_longer_ms: float | None


def measure(run: Run, settings: Settings) -> None:
    """Rounds of filling, decoding, purging while the batch goes on."""
    shape = SHAPES[settings.shape]
    num_tokens = (settings.blocks + settings.others) * _BLOCK
    num_tokens += settings.batch * (settings.context + 4096)
    model = build_model(settings.shape, torch.bfloat16)
    with make_llm(model, num_tokens) as llm:
        check_mode(run, llm)
        seconds, longest_ms, usual_ms = [], [], []
        _fill(llm, settings, settings.others, CacheOptions(), (run.seed, "others"))
        tagged = CacheOptions(tags=(TagSpan(tag=_TAG),))
        prompts = [
            random_prompt(shape, settings.context, (run.seed, r)) for r in range(settings.batch)
        ]
        batch = EngineSteps(llm, prompts, 4000)
        for number in range(settings.rounds):
            _fill(llm, settings, settings.blocks, tagged, (run.seed, number))
            usual_ms.append(median(_steps_ms(batch, 40)))
            start = perf_counter()
            purge = llm.cache.begin_purge(Selector(tags=(_TAG,)))
            steps_ms = [1000 * (perf_counter() - start)]
            while not purge.is_done:
                steps_ms += _steps_ms(batch, 1)
            seconds.append(perf_counter() - start)
            longest_ms.append(max(steps_ms))
            run.check(
                "a purge forgets all blocks with the tag, and no other",
                holds=purge.receipt().deleted == settings.blocks
                and llm.cache.purge(Selector(tags=(_TAG,)), dry_run=True).matched == 0
                and _num_known(llm, settings, run.seed) == settings.others,
                found=f"{purge.receipt().deleted} blocks, {settings.others} others are still there",
            )
        batch.close()
    what = f"purge of {settings.blocks} blocks by tag"
    run.add(f"{what}, beside {settings.batch} streams", seconds, "s", at_most=settings.most_s)
    run.add(
        f"{what}: the longest step is longer by",
        [long - usual for long, usual in zip(longest_ms, usual_ms, strict=True)],
        "ms",
        at_most=settings.most_longer_ms,
    )
    run.add(f"a step of {settings.batch} streams without a purge", usual_ms, "ms")


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
        most_s=1.0,
        most_longer_ms=20,
    ),
    quick=Settings(
        shape="micro",
        blocks=60,
        chain_blocks=6,
        others=12,
        batch=2,
        context=40,
        rounds=2,
        most_s=None,
        most_longer_ms=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
