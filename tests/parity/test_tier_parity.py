"""Tiers below the engine: the same bytes and the same tokens, wherever blocks have been meanwhile.

Every tiny architecture, float32, against plain transformers without a cache. Freed blocks hold NaN.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import Output, Piece
from kvkeep.llm import LLM
from kvkeep.spec import BlockKey
from kvkeep.testing.oracle import OracleRun, greedy
from kvkeep.testing.tiny_models import ARCHITECTURES, build_tiny
from kvkeep.tiers import Disk, Host, Tier
from kvkeep.tiers.stored_form import header_bytes

BLOCK_SIZE = 8
NUM_TOKENS = 6
LENGTHS = (52, 37, 30)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
NEAR_TIE = 1e-3
# One of each kind of cache: all positions, windows, latents, recurrent states, dense layers.
KINDS = ("llama", "gemma3", "deepseek_v3", "qwen3_next", "bloom")


def random_prompts(seed: int = 1) -> list[list[int]]:
    """Prompts that share no first block."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 120) for _ in range(length)] for length in LENGTHS]


def tiered(name: str, folder: Path, *, host: bool = True, **options: Any) -> LLM:
    """An engine over one tiny model with a disk below it, and memory in between."""
    everywhere = ("finished", "reused", "idle", "evicted", "closing")
    tiers: list[Any] = [Host("32MB")] if host else []
    tiers.append(Disk(folder, "64MB", write_on=everywhere))
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "capacity": "4MB", "poison": True}
    settings |= {"idle_s": None, "loading": "always", "calibration_folder": None}
    return LLM(build_tiny(name), tiers=tiers, **(settings | options))


def check(outputs: Sequence[Output], truths: Sequence[OracleRun]) -> None:
    """The tokens are those of the model, up to near ties."""
    num_compared = 0
    for output, truth in zip(outputs, truths, strict=True):
        for at, token_id in enumerate(output.token_ids):
            num_compared += 1
            if token_id != truth.token_ids[at]:
                assert truth.margins[at] < NEAR_TIE, f"token {at} differs"
                break
    assert num_compared > NUM_TOKENS * len(outputs) // 2, "too many near ties to prove much"


def from_tiers(output: Output) -> int:
    """Prompt tokens that came from some tier."""
    sources = output.receipt.tokens_by_source
    return sum(count for source, count in sources.items() if source not in ("device", "computed"))


def tiers_of(llm: LLM) -> tuple[Tier, ...]:
    """The tiers of an engine, nearest first."""
    below = llm.engine.cache._below
    assert below is not None
    return below.stack.tiers


def forget_device(llm: LLM) -> None:
    """All content goes down; the device has none."""
    llm.cache.offload()
    stats = llm.cache.stats()
    assert stats.reusable_bytes == 0
    assert llm.cache.verify().ok


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_the_same_wherever_blocks_have_been(name: str, tmp_path: Path) -> None:
    """Cold, after going down and up, after a restart, with holes in the tiers, with rotten objects."""
    prompts = random_prompts()
    model = build_tiny(name)
    truths = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    with tiered(name, tmp_path) as llm:
        check(llm.generate(prompts, GREEDY), truths)
        forget_device(llm)
        warm = llm.generate(prompts, GREEDY)
        check(warm, truths)
        # Of windows only the last ones are read.
        assert all(from_tiers(output) >= 2 * BLOCK_SIZE for output in warm), warm[0].receipt
        assert all(output.receipt.computed_tokens <= 2 * BLOCK_SIZE for output in warm)
    with tiered(name, tmp_path) as llm:
        again = llm.generate(prompts, GREEDY)
        check(again, truths)
        for output in again:
            assert output.receipt.tokens_by_source.get("disk", 0) >= 2 * BLOCK_SIZE
        for seed in range(3):
            forget_device(llm)
            perforate(tiers_of(llm), seed)
            promised = [sum(map(len, llm.cache.coverage(prompt).gaps)) for prompt in prompts]
            outputs = llm.generate(prompts, GREEDY)
            check(outputs, truths)
            for output, gap in zip(outputs, promised, strict=True):
                assert output.receipt.computed_tokens == max(1, gap)
    assert not [path for path in tmp_path.rglob("*.tmp*") if path.is_file()]


def perforate(tiers: Sequence[Tier], seed: int) -> None:
    """A third of the blocks vanish from every tier."""
    rng = random.Random(seed)
    keys = sorted({one.key for tier in tiers for one in tier.objects()})
    for key in rng.sample(keys, len(keys) // 3):
        for tier in tiers:
            tier.delete([key])


@pytest.mark.parametrize("name", KINDS)
def test_blocks_that_vanish_while_requests_run_are_computed(name: str, tmp_path: Path) -> None:
    """Between any two steps blocks go from the device or from tiers, also those that are being loaded."""
    prompts = random_prompts(5)
    model = build_tiny(name)
    truths = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    rng = random.Random(name)
    with tiered(name, tmp_path, max_batch_tokens=24) as llm:
        llm.generate(prompts, GREEDY)
        for _ in range(4):
            forget_device(llm)
            ids = [llm.engine.add(prompt, GREEDY, CacheOptions()) for prompt in prompts]
            pieces: list[Piece] = []
            while llm.engine.has_work:
                perforate_some(llm, prompts, rng)
                pieces += llm.engine.step()
            outputs = [
                [token for piece in pieces if piece.request_id == one for token in piece.token_ids]
                for one in ids
            ]
            for output, truth in zip(outputs, truths, strict=True):
                assert tuple(output) == truth.token_ids or min(truth.margins) < NEAR_TIE
            assert llm.cache.verify().ok


def perforate_some(llm: LLM, prompts: Sequence[Sequence[int]], rng: random.Random) -> None:
    """One block of some prompt goes everywhere, and one object from some tier."""
    prompt = rng.choice(prompts)
    if rng.random() < 0.3:
        llm.cache.drop(prompt, [rng.randrange(len(prompt) // BLOCK_SIZE)])
    tier = rng.choice(tiers_of(llm))
    keys = sorted(one.key for one in tier.objects())
    if keys and rng.random() < 0.5:
        tier.delete([rng.choice(keys)])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("where", ["header", "payload", "short"])
def test_rotten_objects_are_computed_instead(name: str, where: str, tmp_path: Path) -> None:
    """Wrong bits and missing ends cost their blocks; what lies behind is kept, and the receipt says so."""
    prompts = random_prompts(2)[:2]
    model = build_tiny(name)
    truths = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    with tiered(name, tmp_path, host=False) as llm:
        llm.generate(prompts, GREEDY)
        forget_device(llm)
        disk = tiers_of(llm)[0]
        rotten = spoil(disk, where)
        outputs = llm.generate(prompts, GREEDY)
        check(outputs, truths)
        failures = sum((sum(output.receipt.load_failures.values()) for output in outputs), 0)
        assert 0 < failures <= rotten
        assert all(from_tiers(output) > 0 for output in outputs)
        assert llm.cache.verify().ok
        report = llm.cache.stats().tiers[0]
        assert sum(report.load_failures.values()) == failures


def spoil(tier: Tier, where: str) -> int:
    """Every fifth object, of each group, gets a wrong bit, or loses its end; returns how many."""
    objects = sorted((one.key, one.num_bytes) for one in tier.objects())[::5]
    for key, num_bytes in objects:
        content = bytearray(num_bytes)
        tier.get(key, [memoryview(content)])
        if where == "short":
            content = content[:-1]
        else:
            content[40 if where == "header" else header_bytes(BLOCK_SIZE) + 5] ^= 4
        tier.delete([key])
        tier.put(key, [memoryview(content)], len(content))
    return len(objects)


@pytest.fixture
def primed(tmp_path: Path) -> tuple[Path, list[list[int]]]:
    """A folder with the blocks of some prompts of the tiny llama."""
    prompts = random_prompts(3)
    with tiered("llama", tmp_path) as llm:
        llm.generate(prompts, GREEDY)
    return tmp_path, prompts


@pytest.mark.parametrize(
    "change",
    ["weights", "dtype", "adapter", "rope", "salt", "format", "block size", "none"],
)
def test_what_differs_in_anything_never_meets(
    primed: tuple[Path, list[list[int]]], change: str
) -> None:
    """Every negative beside the same engine unchanged, which does find the blocks."""
    folder, prompts = primed
    model, options, salt = build_tiny("llama"), dict[str, Any](), None
    if change == "weights":
        model.get_input_embeddings().weight[0, 0] += 0.5  # type: ignore[operator, index]
    elif change == "dtype":
        model = build_tiny("llama", dtype=torch.bfloat16)
    elif change == "adapter":
        attention = model.get_submodule("model.layers.0.self_attn")
        attention.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2, 2)))
    elif change == "rope":
        model = build_tiny(
            "llama", changes={"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
        )
    elif change == "salt":
        salt = "somebody else"
    elif change == "format":
        options["kv_format"] = "fp16"
    elif change == "block size":
        options["block_size"] = 16
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "capacity": "4MB", "loading": "always"}
    settings |= {"calibration_folder": None}
    tiers = [Disk(folder, "64MB")]
    with LLM(model, tiers=tiers, **(settings | options)) as llm:
        output = llm.generate([prompts[0]], GREEDY, cache=CacheOptions(salt=salt))[0]
    if change == "none":
        assert from_tiers(output) >= 24
    else:
        assert from_tiers(output) == 0
        assert output.receipt.reused_tokens == 0


def test_payloads_come_back_byte_for_byte(tmp_path: Path) -> None:
    """What was on the device is there again, to the last bit."""
    prompts = random_prompts(4)
    with tiered("llama", tmp_path) as llm:
        llm.generate(prompts, GREEDY)
        before = payloads(llm, prompts)
        assert len(before) == sum(length // BLOCK_SIZE for length in LENGTHS)
        forget_device(llm)
        assert payloads(llm, prompts) == {}
        llm.generate(prompts, GREEDY)
        assert payloads(llm, prompts) == before


def payloads(llm: LLM, prompts: Sequence[Sequence[int]]) -> dict[BlockKey, bytes]:
    """The bytes of every full block of the prompts that is on the device."""
    cache, below = llm.engine.cache, llm.engine.cache._below
    assert below is not None
    found: dict[BlockKey, bytes] = {}
    for prompt in prompts:
        for key in llm.engine.chain(prompt).keys:
            block = cache._ledgers[0].get(key)
            if block is not None:
                found[key] = bytes(below._payloads.view(0, block))
    return found
