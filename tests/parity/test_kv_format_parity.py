"""K/V in every format: what is served does not depend on how it came into the cache.

The truth of a format is the engine's own answer to a request alone, cold and in one piece, with torch in
place of the kernels. Against it: the kernels, {alone, with others} x {cold, warm, gaps} x {whole, chunked},
and preempted. Freed blocks hold NaN.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeep.config import SamplingParams
from kvkeep.engine.sampler import Sampled, Sampler, SampleRow
from kvkeep.llm import LLM
from kvkeep.native import Kernels, load_kernels
from kvkeep.scheduling.scheduler import _Step
from kvkeep.testing.tiny_models import build_tiny

BLOCK_SIZE = 8
NUM_TOKENS = 6
PROMPT_LENGTHS = (52, 37, 9, 30)
CHUNK = 20
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
FORMATS = ("float32", "bfloat16", "float16", "fp8", "int8", "int4", "k8v4")
# Full attention, windows, sinks, softcap, layers that share K/V, MLA latents, recurrent layers.
ROUTED = ("gpt_oss", "deepseek_v3")
NAMES = ("llama", "gemma3", "gpt_oss", "gemma2", "gemma3n", "deepseek_v3", "lfm2")
# Of the logits' magnitude, over all tokens: about five times what was found. Rounding moves some elements to
# a neighbouring code, which a router of experts amplifies; a wrong block changes everything.
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 1e-3,
    "float16": 2e-4,
    "fp8": 5e-3,
    "int8": 5e-3,
    "int4": 0.05,
    "k8v4": 0.025,
}
ROUTED_TOLERANCE = TOLERANCE | {"int4": 0.3, "k8v4": 0.1}

Logits = dict[tuple[tuple[int, ...], int], Tensor]


class RecordingSampler(Sampler):
    """A sampler that keeps the logits each token was chosen from, by prompt and place in the output."""

    logits: Logits

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "logits", {})

    def sample(self, logits_BV: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        for logits_V, row in zip(logits_BV, rows, strict=True):
            self.logits[tuple(row.prompt_ids), len(row.output_ids)] = logits_V.float()
        return super().sample(logits_BV, rows)


def random_prompts() -> list[list[int]]:
    """Prompts that share no first block."""
    rng = random.Random(1)
    return [[rng.randrange(3, 120) for _ in range(length)] for length in PROMPT_LENGTHS]


def serve(llm: LLM, prompts: Sequence[list[int]]) -> Logits:
    """The logits of the prompts' tokens."""
    sampler = RecordingSampler()
    llm.engine._sampler = sampler
    llm.generate(list(prompts), GREEDY)
    assert llm.cache.verify().problems == ()
    return sampler.logits


def difference(found: Logits, truth: Logits) -> float:
    """Root mean square over that of the truth, of the tokens before which both chose the same."""
    errors, sizes = [], []
    for (prompt, at), logits_V in found.items():
        chosen = [
            (found[prompt, before].argmax(), truth[prompt, before].argmax()) for before in range(at)
        ]
        if all(own == other for own, other in chosen):
            errors.append((logits_V - truth[prompt, at]).square().mean())
            sizes.append(truth[prompt, at].square().mean())
    assert len(errors) >= len(found) // 2, "too many different tokens to compare"
    return (torch.stack(errors).mean() / torch.stack(sizes).mean()).sqrt().item()


@contextmanager
def preempting(llm: LLM) -> Iterator[None]:
    """Before some of the plans, take all blocks of all requests, and lose some of them."""
    scheduler, numbers, rng = llm.engine._scheduler, count(), random.Random(0)
    original = scheduler.plan

    def plan() -> object:
        if next(numbers) in (1, 3):
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


@pytest.mark.parametrize(
    ("kv_format", "is_first_exact"),
    [*((one, False) for one in FORMATS), ("int4", True)],
    ids=[*FORMATS, "int4-first-block-exact"],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_format_serves_the_same_however_it_was_filled(
    name: str, kv_format: str, is_first_exact: bool
) -> None:
    """Kernels, hits, gaps, chunks, neighbours and preemption change nothing beyond rounding."""
    if not isinstance(load_kernels(), Kernels):
        pytest.skip("the compiled kernels are not installed")
    prompts = random_prompts()
    common: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "capacity": "16MB",
        "poison": True,
        "kv_format": kv_format,
        "kv_exact_layers": (),
        "kv_exact_first_block": is_first_exact,
    }
    model = build_tiny(name)
    truth: Logits = {}
    slow = LLM(model, max_batch_tokens=512, kernels="torch", **common)
    for prompt in prompts:
        truth |= serve(slow, [prompt])
    found: dict[str, Logits] = {}
    for max_batch_tokens in (512, CHUNK):
        fast = LLM(model, max_batch_tokens=max_batch_tokens, **common)
        assert isinstance(fast.installed.kernels, Kernels)
        for state in ("cold", "warm", "gaps"):
            if state == "gaps":
                for prompt in prompts:
                    assert fast.cache.drop(prompt, [0, len(prompt) // BLOCK_SIZE - 1]).num_blocks
            found[f"{state} {max_batch_tokens} alone"] = serve(fast, prompts[:1])
            found[f"{state} {max_batch_tokens} together"] = serve(fast, prompts)
        fast.cache.clear()
        with preempting(fast):
            found[f"preempted {max_batch_tokens}"] = serve(fast, prompts)
    differences = {way: difference(logits, truth) for way, logits in found.items()}
    tolerance = ROUTED_TOLERANCE if name in ROUTED else TOLERANCE
    assert max(differences.values()) <= tolerance[kv_format], differences
