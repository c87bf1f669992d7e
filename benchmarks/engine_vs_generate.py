"""The engine with one request against `generate` of transformers with a DynamicCache."""

from dataclasses import dataclass

import torch

from benchmarks.harness import Run, Script, alternate, timed
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import (
    DecodeLoop,
    EngineSteps,
    check_mode,
    exact_model,
    generated,
    make_llm,
    static_batch,
)
from kvkeep.llm import LLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`steps` decode steps are compared in lock-step, then `runs` whole calls of `tokens` tokens."""

    shape: str
    context: int
    tokens: int
    steps: int
    runs: int
    at_least: float | None


def measure(run: Run, settings: Settings) -> None:
    """Decode steps in turn, then whole calls in turn."""
    _check_tokens(run, settings)
    model = build_model(settings.shape, torch.bfloat16)
    llm = make_llm(model, settings.context + settings.steps + settings.tokens + 64)
    check_mode(run, llm)
    _compare_steps(run, settings, llm)
    _compare_calls(run, settings, llm)


def _compare_steps(run: Run, settings: Settings, llm: LLM) -> None:
    shape, context = SHAPES[settings.shape], settings.context
    prompt = random_prompt(shape, context, (run.seed, "steps"))
    loop = DecodeLoop(llm.model, [prompt])
    steps = EngineSteps(llm, [prompt], settings.steps + 8)
    paired = alternate(
        lambda _: loop.step(),
        lambda _: steps.step(),
        rounds=settings.steps,
        warmups=4,
        budget_s=run.budget_s / 2,
    )
    steps.close()
    run.add(
        "decode step: bare DynamicCache loop over engine",
        paired.first_over_second(),
        "times",
        at_least=settings.at_least,
    )
    run.add("bare DynamicCache loop, step", paired.first_s, "s")
    engine_s = run.add("engine, step", paired.second_s, "s")
    run.floor(
        "an engine step",
        num_bytes=shape.weight_bytes() + shape.kv_bytes(context),
        operations=shape.operations(context, context + 1),
        measured_s=engine_s,
    )


def _compare_calls(run: Run, settings: Settings, llm: LLM) -> None:
    shape, num_tokens = SHAPES[settings.shape], settings.tokens

    def prompts(number: int) -> list[list[int]]:
        return [random_prompt(shape, settings.context, (run.seed, "call", number))]

    calls = alternate(
        lambda number: timed(lambda: static_batch(llm.model, prompts(number), num_tokens)),
        lambda number: timed(lambda: generated(llm, prompts(number), num_tokens)),
        rounds=settings.runs,
        warmups=0,
        budget_s=run.budget_s / 2,
    )
    run.add(
        f"whole call, {settings.context} + {num_tokens} tokens: generate over engine",
        calls.first_over_second(),
        "times",
        at_least=settings.at_least,
    )
    run.add("generate, whole call", calls.first_s, "s")
    run.add("engine, whole call", calls.second_s, "s")
    run.notes.append("every whole call has a new prompt: nothing is reused")


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompts = [random_prompt(shape, settings.context, (run.seed, "check"))]
    num_tokens = min(16, settings.tokens)
    wanted = static_batch(model, prompts, num_tokens)
    found = generated(make_llm(model, settings.context + 64), prompts, num_tokens)
    run.check(
        "generate and engine give the same tokens in float32 (2 layers)",
        holds=found == wanted,
        found=f"{len(wanted[0])} tokens, {len(set(wanted[0]))} different",
    )


main = Script(
    name="engine_vs_generate",
    claim="With one request the engine is not slower than generate with a DynamicCache.",
    full=Settings(shape="qwen3-0.6b", context=512, tokens=64, steps=96, runs=4, at_least=1.0),
    quick=Settings(shape="micro", context=48, tokens=4, steps=4, runs=2, at_least=None),
    measure=measure,
)

if __name__ == "__main__":
    main()
