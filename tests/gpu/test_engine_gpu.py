"""The engine on a CUDA device against plain transformers without a cache on the same device."""

from collections.abc import Iterator

import pytest
import torch

from kvkeep.config import SamplingParams
from kvkeep.llm import LLM
from kvkeep.testing.oracle import OracleRun, greedy
from kvkeep.testing.tiny_models import ARCHITECTURES, build_tiny
from tests.parity.test_engine_parity import (
    BLOCK_SIZE,
    CHUNK,
    LOGIT_TOLERANCE,
    NUM_TOKENS,
    Served,
    open_random_gaps,
    random_prompts,
    run,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """No TF32, which would differ between shapes by more than what is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def served_on_gpu(name: str, max_batch_tokens: int) -> Served:
    """An engine over one tiny model on the device, and what the model says there by itself."""
    prompts = random_prompts()
    oracle = build_tiny(name)
    oracle.to(device="cuda")  # type: ignore[call-arg]
    truths = {}
    for prompt in prompts:
        truth = greedy(oracle, prompt, NUM_TOKENS)
        truths[tuple(prompt)] = OracleRun(token_ids=truth.token_ids, logits=truth.logits.cpu())
    llm = LLM(
        build_tiny(name),
        device="cuda",
        block_size=BLOCK_SIZE,
        capacity="16MB",
        poison=True,
        max_batch_tokens=max_batch_tokens,
    )
    return Served(name, llm, prompts, truths)


@pytest.mark.parametrize("max_batch_tokens", [512, CHUNK], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_and_logits_are_those_of_the_model_without_a_cache(
    name: str, max_batch_tokens: int
) -> None:
    """Four requests together: cold, warm, with gaps, and preempted; logits within the same bound."""
    assert LOGIT_TOLERANCE[name] <= 5e-4
    served = served_on_gpu(name, max_batch_tokens)
    for state in ("cold", "warm", "gaps", "preempted"):
        if state in ("gaps", "preempted"):
            open_random_gaps(served, served.prompts, f"{name} {state}")
        served.check(run(served, served.prompts, is_preempted=state == "preempted"))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "lfm2"])
def test_bfloat16_repeats_itself_from_the_cache(name: str) -> None:
    """In half precision the self-test passes, and a warm run with a repaired gap gives the cold tokens."""
    llm = LLM(
        build_tiny(name, dtype=torch.bfloat16),
        device="cuda",
        block_size=BLOCK_SIZE,
        capacity="16MB",
    )
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=5)
    (prompt, *_) = random_prompts()

    (cold,) = llm.generate(prompt, params)
    llm.cache.drop(prompt, [1, 3])
    (repaired,) = llm.generate(prompt, params)

    assert repaired.receipt.reused_tokens > 0
    cold_top = {one.token_id: one.logprob for one in cold.choices[0].sampled[0].top}
    repaired_top = {one.token_id: one.logprob for one in repaired.choices[0].sampled[0].top}
    for token_id in cold_top.keys() & repaired_top.keys():
        assert repaired_top[token_id] == pytest.approx(cold_top[token_id], abs=0.25)
    assert len(cold_top.keys() & repaired_top.keys()) >= 3


def test_arenas_lie_on_the_device() -> None:
    """All memory that attention reads is device memory, within the capacity asked for."""
    llm = LLM(build_tiny("llama"), device="cuda", block_size=BLOCK_SIZE, capacity="4MB")

    arenas = llm.installed.arenas.arenas.values()

    assert all(arena.block(0).is_cuda for arena in arenas)  # type: ignore[arg-type]  # a plain number
    assert sum(arena.num_bytes for arena in arenas) <= 4_000_000
