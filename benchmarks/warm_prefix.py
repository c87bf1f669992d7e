"""How much sooner the first token comes when the long beginning of a prompt is cached."""

from dataclasses import dataclass

import torch

from benchmarks.harness import Run, Script, alternate
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, exact_model, generated, make_llm


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A prompt is `prefix` tokens, the same for two requests, and `question` tokens of its own."""

    shape: str
    prefix: int
    question: int
    rounds: int
    at_least: float | None


def measure(run: Run, settings: Settings) -> None:
    """Each round has a new prefix: one request meets it cold, the next one warm."""
    shape, total = SHAPES[settings.shape], settings.prefix + settings.question
    _check_tokens(run, settings)
    llm = make_llm(build_model(settings.shape, torch.bfloat16), 2 * total)
    check_mode(run, llm)

    def ask(number: int, question: str) -> int:
        prefix = random_prompt(shape, settings.prefix, (run.seed, "prefix", number))
        own = random_prompt(shape, settings.question, (run.seed, question, number))
        reused_before = llm.cache.stats().reused_tokens
        generated(llm, [prefix + own], 1)
        return llm.cache.stats().reused_tokens - reused_before

    reused: list[int] = []
    paired = alternate(
        lambda number: _nothing(ask(number, "cold")),
        lambda number: reused.append(ask(number, "warm")),
        rounds=settings.rounds,
        warmups=0,
        budget_s=run.budget_s,
        flips=False,  # what is warm was cold before
    )
    run.check(
        f"every warm request reused the prefix of {settings.prefix} tokens",
        holds=min(reused) >= settings.prefix - settings.prefix % 32,
        found=f"(at least {min(reused)})",
    )
    run.add(
        f"first token behind {settings.prefix} tokens: cold over warm",
        paired.first_over_second(),
        "times",
        at_least=settings.at_least,
    )
    cold_s = run.add("cold, first token", paired.first_s, "s")
    warm_s = run.add("warm, first token", paired.second_s, "s")
    for what, start, measured_s in (("cold", 0, cold_s), ("warm", settings.prefix, warm_s)):
        run.floor(
            f"the first token, {what}",
            num_bytes=shape.weight_bytes() + shape.kv_bytes(total),
            operations=shape.operations(start, total),
            measured_s=measured_s,
        )


def _nothing(_: object) -> None:
    """The whole time of a side counts."""


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prefix = random_prompt(shape, settings.prefix, (run.seed, "check"))
    questions = [random_prompt(shape, settings.question, (run.seed, at)) for at in range(2)]
    llm = make_llm(model, 2 * (settings.prefix + 64))
    generated(llm, [prefix + questions[0]], 8)
    warm = generated(llm, [prefix + questions[1]], 8)
    llm.cache.clear()
    cold = generated(llm, [prefix + questions[1]], 8)
    run.check(
        "warm and cold requests give the same tokens in float32 (2 layers)",
        holds=warm == cold,
        found=f"{len(cold[0])} tokens, {len(set(cold[0]))} different",
    )


main = Script(
    name="warm_prefix",
    claim="Behind a warm prefix of 4,096 tokens the first token comes 30x sooner than cold.",
    full=Settings(shape="qwen3-0.6b", prefix=4096, question=16, rounds=3, at_least=30),
    quick=Settings(shape="micro", prefix=192, question=8, rounds=2, at_least=None),
    measure=measure,
)

if __name__ == "__main__":
    main()
