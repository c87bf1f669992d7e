"""Many requests at once: the engine against continuous batching and a static batch of transformers."""

from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.harness import Paired, Run, Script, alternate, timed
from benchmarks.shapes import SHAPES, Shape, build_model, random_prompt
from benchmarks.sides import (
    DecodeLoop,
    EngineSteps,
    check_mode,
    continuous_batch,
    exact_model,
    generated,
    make_llm,
    static_batch,
)
from kvkeep.llm import LLM

_SIDES = ("engine", "static generate", "generate_batch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`rounds` whole batches on each side, then `steps` decode steps against the static batch."""

    shape: str
    sequences: int
    context: int
    tokens: int
    rounds: int
    steps: int
    page_size: int
    over_continuous: float | None
    over_static: float | None


def measure(run: Run, settings: Settings) -> None:
    """Whole batches of the three sides in turn, then decode steps of two in lock-step."""
    _check_tokens(run, settings)
    shape = SHAPES[settings.shape]
    model = build_model(settings.shape, torch.bfloat16)
    room = settings.sequences * (settings.context + settings.tokens + settings.steps + 64)
    llm = make_llm(model, room)
    check_mode(run, llm)
    seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
    start = perf_counter()
    for number in range(settings.rounds):
        prompts = _prompts(shape, settings, (run.seed, number))
        for at in range(len(_SIDES)):
            side = _SIDES[(at + number) % len(_SIDES)]
            seconds[side].append(_whole_batch(side, llm, prompts, settings))
        # A round takes minutes: none is begun that would not end in time.
        if (perf_counter() - start) * (number + 2) / (number + 1) > 0.8 * run.budget_s:
            break
    _report(run, settings, seconds)
    _compare_steps(run, settings, llm, prompts)


def _whole_batch(side: str, llm: LLM, prompts: list[list[int]], settings: Settings) -> float:
    """Seconds for all prompts and all tokens."""
    num_tokens = settings.tokens
    if side == "generate_batch":
        return continuous_batch(llm.model, prompts, num_tokens, page_size=settings.page_size)[1]
    if side == "static generate":
        return timed(lambda: static_batch(llm.model, prompts, num_tokens))
    return timed(lambda: generated(llm, prompts, num_tokens))


def _report(run: Run, settings: Settings, seconds: dict[str, list[float]]) -> None:
    engine_s = seconds["engine"]
    what = f"{settings.sequences} x ({settings.context} + {settings.tokens}) tokens"
    over_continuous = Paired(engine_s, seconds["generate_batch"]).second_over_first()
    over_static = Paired(engine_s, seconds["static generate"]).second_over_first()
    run.add(
        f"{what}: generate_batch over engine",
        over_continuous,
        "times",
        at_least=settings.over_continuous,
    )
    run.add(
        f"{what}: static generate over engine", over_static, "times", at_least=settings.over_static
    )
    for side, side_s in seconds.items():
        run.add(f"{side}, whole batch", side_s, "s")
    run.notes.append("prompts have one length, so the static batch has no padding; all are new")
    run.notes.append("generate_batch is given its memory; making and ending it is not counted")


def _compare_steps(run: Run, settings: Settings, llm: LLM, prompts: list[list[int]]) -> None:
    """Decode steps of all sequences, engine and static batch in turn."""
    shape = SHAPES[settings.shape]
    loop = DecodeLoop(llm.model, prompts)
    # The engine knows these prompts, so all of its requests decode from the first step on.
    steps = EngineSteps(llm, prompts, settings.steps + 64)
    paired = alternate(
        lambda _: loop.step(), lambda _: steps.step(), rounds=settings.steps, warmups=2
    )
    steps.close()
    run.add(
        f"decode step of {settings.sequences}: bare DynamicCache loop over engine",
        paired.first_over_second(),
        "times",
        at_least=settings.over_static,
    )
    run.add("bare DynamicCache loop, step", paired.first_s, "s")
    engine_s = run.add("engine, step", paired.second_s, "s")
    context = settings.context
    run.floor(
        "an engine step",
        num_bytes=shape.weight_bytes() + shape.kv_bytes(context) * settings.sequences,
        operations=shape.operations(context, context + 1) * settings.sequences,
        measured_s=engine_s,
    )


def _prompts(shape: Shape, settings: Settings, seed: object) -> list[list[int]]:
    return [
        random_prompt(shape, settings.context, (seed, row)) for row in range(settings.sequences)
    ]


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompts = _prompts(shape, settings, (run.seed, "check"))
    num_tokens = min(8, settings.tokens)
    wanted = static_batch(model, prompts, num_tokens)
    llm = make_llm(model, settings.sequences * (settings.context + 64))
    found = generated(llm, prompts, num_tokens)
    continuous, _ = continuous_batch(model, prompts, num_tokens, page_size=settings.page_size)
    different = len({token for row in wanted for token in row})
    run.check(
        "engine, generate_batch and generate give the same tokens in float32 (2 layers)",
        holds=found == wanted and continuous == wanted,
        found=f"{len(wanted)} x {num_tokens} tokens, {different} different",
    )


main = Script(
    name="batch32",
    claim="32 sequences run 3x as fast as in generate_batch, and not slower than in a static batch.",
    full=Settings(
        shape="qwen3-0.6b",
        sequences=32,
        context=256,
        tokens=64,
        rounds=2,
        steps=24,
        page_size=256,
        over_continuous=3.0,
        over_static=1.0,
    ),
    quick=Settings(
        shape="micro",
        sequences=4,
        context=40,
        tokens=4,
        rounds=1,
        steps=4,
        page_size=32,
        over_continuous=None,
        over_static=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
