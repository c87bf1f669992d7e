"""The engine against plain transformers without a cache: same tokens, same logits, however served.

The matrix is {every tiny architecture} x {alone, with three others} x {cold, warm, random gaps} x
{whole, chunked prefill} x {preempted, not}. Freed blocks hold NaN throughout, so that reading what
nobody wrote shows up.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from torch import Tensor

from kvkeep.config import SamplingParams
from kvkeep.engine import Output
from kvkeep.engine.sampler import Sampled, Sampler, SampleRow
from kvkeep.hf import install
from kvkeep.llm import LLM
from kvkeep.scheduling.scheduler import _Step
from kvkeep.spec import LayerKind
from kvkeep.testing.oracle import OracleRun, greedy
from kvkeep.testing.tiny_models import ARCHITECTURES, build_tiny

BLOCK_SIZE = 8
NUM_TOKENS = 8
PROMPT_LENGTHS = (52, 37, 9, 30)
CHUNK = 20  # two and a half blocks
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
# Absolute. The chunked scan that transformers runs over several tokens of a linear-attention layer and
# the recurrent step that it runs over one differ by more than rounding does elsewhere.
LOGIT_TOLERANCE = dict.fromkeys(ARCHITECTURES, 1e-4) | {"qwen3_next": 5e-4}
# Of two logits closer than this either may win.
NEAR_TIE = 1e-3


class RecordingSampler(Sampler):
    """A sampler that keeps the logits each token was chosen from, by prompt and place in the output."""

    logits: dict[tuple[tuple[int, ...], int], Tensor]

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "logits", {})

    def sample(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for logits_V, row in zip(logits_BV, rows, strict=True):
            self.logits[tuple(row.prompt_ids), len(row.output_ids)] = logits_V.float().cpu()
        return super().sample(logits_BV, rows)


@dataclass
class Served:
    """An engine over one tiny model, and what the model says by itself."""

    name: str
    llm: LLM
    prompts: list[list[int]]
    truths: dict[tuple[int, ...], OracleRun]
    sampler: RecordingSampler = field(default_factory=RecordingSampler)

    def __post_init__(self) -> None:
        self.llm.engine._sampler = self.sampler

    def check(self, outputs: Sequence[Output]) -> float:
        """Compare tokens and logits with the truth; returns the largest difference of a logit."""
        worst, num_compared = 0.0, 0
        for output in outputs:
            truth = self.truths[output.prompt_ids]
            assert len(output.token_ids) == NUM_TOKENS
            for at, token_id in enumerate(output.token_ids):
                difference = self.sampler.logits[output.prompt_ids, at] - truth.logits[at]
                worst = max(worst, difference.abs().max().item())
                num_compared += 1
                if token_id != truth.token_ids[at]:
                    assert truth.margins[at] < NEAR_TIE, f"token {at} of {output.prompt_ids}"
                    break
        assert worst <= LOGIT_TOLERANCE[self.name]
        assert num_compared >= NUM_TOKENS * len(outputs) // 2, "too many near ties to prove much"
        self.sampler.logits.clear()
        self.check_nothing_is_held()
        return worst

    def check_nothing_is_held(self) -> None:
        """No lease is open and the books are right."""
        stats = self.llm.cache.stats()
        assert (stats.open_leases, stats.in_use_bytes) == (0, 0)
        assert self.llm.cache.verify().problems == ()


def random_prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    """Prompts that share no first block."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 120) for _ in range(length)] for length in lengths]


def truths_of(name: str, prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], OracleRun]:
    """What a separately built model says without any cache."""
    model = build_tiny(name)
    return {tuple(prompt): greedy(model, prompt, NUM_TOKENS) for prompt in prompts}


def tight_blocks(llm: LLM, num_tokens: int) -> list[int]:
    """Blocks in which one request of `num_tokens` just fits, so that several do not."""
    cache = llm.engine.cache
    needed = cache.blocks_needed(num_tokens, llm.settings.max_batch_tokens)
    # Without states for all, requests would wait for their turn and never be preempted.
    return [
        num_blocks + (len(PROMPT_LENGTHS) if group.kind is LayerKind.RECURRENT else 0)
        for num_blocks, group in zip(needed, cache.spec.groups, strict=True)
    ]


@contextmanager
def preempting(llm: LLM, plans: Sequence[int]) -> Iterator[None]:
    """Before these of the next plans, take all blocks of all requests, and lose some of them."""
    scheduler, numbers, rng = llm.engine._scheduler, count(), random.Random(0)
    original = scheduler.plan

    def plan() -> object:
        if next(numbers) in plans:
            for request in reversed(scheduler._running[:]):
                scheduler._preempt(_Step(0), request)
                num_full = len(request.chain.keys)
                llm.engine.cache.drop(request.chain, rng.sample(range(num_full), num_full // 2))
        return original()

    scheduler.plan = plan  # type: ignore[method-assign, assignment]  # put back below
    try:
        yield
    finally:
        del scheduler.plan


@pytest.fixture(scope="module", params=ARCHITECTURES)
def engines(request: pytest.FixtureRequest) -> dict[str, Served]:
    """An engine that takes whole prompts and one that takes them in chunks; one set of truths."""
    name: str = request.param
    prompts = random_prompts()
    truths = truths_of(name, prompts)
    common: dict[str, Any] = {"block_size": BLOCK_SIZE, "capacity": "16MB", "poison": True}
    whole = LLM(build_tiny(name), max_batch_tokens=512, **common)
    chunked = LLM(
        whole.model,
        max_batch_tokens=CHUNK,
        mode=whole.installed.paged.mode.value,
        self_test=False,
        **common,
    )
    return {
        "whole": Served(name, whole, prompts, truths),
        "chunked": Served(name, chunked, prompts, truths),
    }


def run(served: Served, prompts: Sequence[list[int]], *, is_preempted: bool) -> list[Output]:
    """Generate, and check the receipts against what the cache counted and had promised."""
    cache = served.llm.cache
    promised = [sum(len(gap) for gap in cache.coverage(prompt).gaps) for prompt in prompts]
    computed_before = cache.stats().computed_tokens
    with preempting(served.llm, (1, 3, 6) if is_preempted else ()):
        outputs = served.llm.generate(prompts, GREEDY)
    receipts = [output.receipt for output in outputs]
    # Where coverage says that all is known, the last token is computed for its logits alone. A request
    # that starts again may find that it needs less.
    for receipt, gap in zip(receipts, promised, strict=True):
        assert receipt.computed_tokens <= max(1, gap)
        assert receipt.computed_tokens == max(1, gap) or is_preempted
    assert all((receipt.num_preemptions > 0) == is_preempted for receipt in receipts)
    # The last token of an output is chosen and never computed.
    counted = sum(r.computed_tokens + r.output_tokens - 1 + r.recomputed_tokens for r in receipts)
    assert cache.stats().computed_tokens - computed_before == counted
    return outputs


def open_random_gaps(served: Served, prompts: Sequence[list[int]], seed: str) -> None:
    """Forget some blocks of every prompt."""
    rng = random.Random(seed)
    for prompt in prompts:
        num_full = len(prompt) // BLOCK_SIZE
        # The last one too: of the others a window may need, and hold, none.
        numbers = [*rng.sample(range(num_full), rng.randint(0, num_full - 1)), num_full - 1]
        assert served.llm.cache.drop(prompt, numbers).num_blocks > 0


@pytest.mark.parametrize("is_preempted", [False, True], ids=["undisturbed", "preempted"])
@pytest.mark.parametrize("prefill", ["whole", "chunked"])
@pytest.mark.parametrize("num_prompts", [1, len(PROMPT_LENGTHS)], ids=["alone", "batched"])
def test_tokens_and_logits_are_those_of_the_model_without_a_cache(
    engines: dict[str, Served], num_prompts: int, prefill: str, is_preempted: bool
) -> None:
    """Cold, warm and with random gaps repaired; receipts count what was promised and computed."""
    served = engines[prefill]
    cache, prompts = served.llm.cache, served.prompts[:num_prompts]
    cache.clear()
    for state in ("cold", "warm", "gaps"):
        if state == "gaps":
            open_random_gaps(served, prompts, f"{served.name} {num_prompts} {prefill}")
        served.check(run(served, prompts, is_preempted=is_preempted))
        for prompt in prompts:
            # Recurrent layers go back to the last saved state, at most one block before the end.
            gaps = cache.coverage(prompt).gaps
            last_boundary = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
            is_recurrent = served.llm.installed.geometry.spec.is_recurrent
            known_until = last_boundary if is_recurrent else len(prompt) - 1
            assert all(gap.start >= known_until for gap in gaps), f"{state}: {gaps}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_requests_that_do_not_fit_together_preempt_each_other_and_stay_exact(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arena with room for one request serves four, and somebody had to give blocks back."""
    prompts = random_prompts()
    options: dict[str, Any] = {"block_size": BLOCK_SIZE, "max_batch_tokens": CHUNK, "poison": True}
    roomy = LLM(build_tiny(name), capacity="1MB", **options)
    num_blocks = tight_blocks(roomy, max(PROMPT_LENGTHS) + NUM_TOKENS)
    monkeypatch.setattr(install, "fit_blocks", lambda *_args, **_sizes: num_blocks)
    mode = roomy.installed.paged.mode.value
    tight = LLM(roomy.model, mode=mode, self_test=False, **options)
    served = Served(name, tight, prompts, truths_of(name, prompts))

    outputs = tight.generate(prompts, GREEDY)

    assert sum(output.receipt.num_preemptions for output in outputs) >= 1
    served.check(outputs)
