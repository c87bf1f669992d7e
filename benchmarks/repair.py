"""What it costs to compute only the missing blocks of a prompt."""

import random
from dataclasses import dataclass

import torch

from benchmarks.harness import Run, Script, timed
from benchmarks.shapes import SHAPES, Shape, build_model, random_prompt
from benchmarks.sides import check_mode, exact_model, generated, make_llm
from kvkeep.llm import LLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of a prompt of `prompt` tokens a share `missing` of the blocks is forgotten, chosen at random."""

    shape: str
    prompt: int
    missing: float
    rounds: int
    repairs: int
    at_most: float | None


def measure(run: Run, settings: Settings) -> None:
    """Each round has a new prompt: computed whole, then `repairs` times in part."""
    shape = SHAPES[settings.shape]
    _check_tokens(run, settings)
    llm = make_llm(build_model(settings.shape, torch.bfloat16), settings.prompt + 64)
    check_mode(run, llm)
    chooser = random.Random(run.seed)
    ratios, whole_s, part_s = [], [], []
    spent_s = 0.0
    for number in range(settings.rounds):
        prompt = random_prompt(shape, settings.prompt, (run.seed, number))
        whole_s.append(_first_token(llm, prompt))
        for _ in range(settings.repairs):
            num_missing = _perforate(llm, prompt, settings.missing, chooser)
            part_s.append(_first_token(llm, prompt))
            ratios.append(part_s[-1] / whole_s[-1])
        spent_s += whole_s[-1] + sum(part_s[-settings.repairs :])
        if number and spent_s > run.budget_s:
            break
    run.add(
        f"repair of {settings.missing:.0%} of {settings.prompt} tokens over computing all",
        ratios,
        "share",
        at_most=settings.at_most,
    )
    run.add("first token, all computed", whole_s, "s")
    repair_s = run.add("first token, repaired", part_s, "s")
    run.notes.append(f"{num_missing} of {settings.prompt // 32} blocks missing, at random places")
    _floor(run, shape, settings, repair_s)


def _first_token(llm: LLM, prompt: list[int]) -> float:
    return timed(lambda: generated(llm, [prompt], 1))


def _floor(run: Run, shape: Shape, settings: Settings, repair_s: float) -> None:
    num_tokens = int(settings.missing * settings.prompt)
    middle = settings.prompt // 2
    run.floor(
        "a repair",
        num_bytes=shape.weight_bytes() + shape.kv_bytes(settings.prompt),
        operations=shape.operations(middle - num_tokens // 2, middle + num_tokens // 2),
        measured_s=repair_s,
    )


def _perforate(llm: LLM, prompt: list[int], share: float, chooser: random.Random) -> int:
    """Forget a share of the prompt's blocks; returns how many."""
    num_full = len(prompt) // llm.settings.block_size
    missing = chooser.sample(range(num_full), max(1, round(share * num_full)))
    receipt = llm.cache.drop(prompt, missing)
    assert receipt.num_blocks == len(missing)
    return len(missing)


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompt = random_prompt(shape, settings.prompt, (run.seed, "check"))
    llm = make_llm(model, settings.prompt + 64)
    whole = generated(llm, [prompt], 8)
    num_missing = _perforate(llm, prompt, settings.missing, random.Random(run.seed))
    repaired = generated(llm, [prompt], 8)
    run.check(
        f"with {num_missing} blocks repaired the tokens are the same in float32 (2 layers)",
        holds=repaired == whole,
        found=f"{len(whole[0])} tokens, {len(set(whole[0]))} different",
    )


main = Script(
    name="repair",
    claim="With a tenth of the blocks missing the first token takes a fifth of computing everything.",
    full=Settings(shape="qwen3-0.6b", prompt=4096, missing=0.1, rounds=3, repairs=2, at_most=0.2),
    quick=Settings(shape="micro", prompt=320, missing=0.1, rounds=2, repairs=1, at_most=None),
    measure=measure,
)

if __name__ == "__main__":
    main()
