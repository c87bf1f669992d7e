"""How much sooner the next token comes from the cache than from computing everything again."""

from dataclasses import dataclass

import torch

from benchmarks.harness import Run, Script, alternate
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import EngineSteps, check_mode, exact_model, make_llm, uncached_token


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """`at_least[i]` is the target past `contexts[i]` tokens."""

    shape: str
    contexts: tuple[int, ...]
    at_least: tuple[float | None, ...]
    rounds: int


def measure(run: Run, settings: Settings) -> None:
    """One uncached and one cached token in turn, past each context."""
    shape = SHAPES[settings.shape]
    _check_tokens(run, settings)
    model = build_model(settings.shape, torch.bfloat16)
    llm = make_llm(model, max(settings.contexts) + 64)
    check_mode(run, llm)
    for context, at_least in zip(settings.contexts, settings.at_least, strict=True):
        prompt = random_prompt(shape, context, (run.seed, context))
        steps = EngineSteps(llm, [prompt], settings.rounds + 2)
        (out,) = steps.tokens.values()
        known = out[:1]

        def uncached(number: int, prompt: list[int] = prompt, known: list[int] = known) -> None:
            uncached_token(model, prompt + known * (1 + number))

        def cached(_: int, steps: EngineSteps = steps) -> None:
            steps.step()

        budget_s = run.budget_s / len(settings.contexts)
        paired = alternate(uncached, cached, rounds=settings.rounds, budget_s=budget_s)
        steps.close()
        run.add(
            f"uncached over cached, per token past {context}",
            paired.first_over_second(),
            "times",
            at_least=at_least,
        )
        run.add(f"uncached, token past {context}", paired.first_s, "s")
        cached_s = run.add(f"cached, token past {context}", paired.second_s, "s")
        run.floor(
            f"cached token past {context}",
            num_bytes=shape.weight_bytes() + shape.kv_bytes(context),
            operations=shape.operations(context, context + 1),
            measured_s=cached_s,
        )


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    context = settings.contexts[0]
    prompt = random_prompt(shape, context, (run.seed, "check"))
    steps = EngineSteps(make_llm(model, context + 64), [prompt], 9)
    for _ in range(7):
        steps.step()
    (found,) = steps.tokens.values()
    steps.close()
    wanted: list[int] = []
    for _ in found:
        wanted.append(uncached_token(model, prompt + wanted))
    run.check(
        f"cached and uncached tokens past {context} are the same in float32 (2 layers)",
        holds=found == wanted,
        found=f"{len(wanted)} tokens, {len(set(wanted))} different",
    )


main = Script(
    name="cached_vs_uncached",
    claim="A token from the cache costs a fraction of one without: 8x past 512 tokens, 15x past 1,024.",
    full=Settings(shape="qwen3-0.6b", contexts=(512, 1024), at_least=(8, 15), rounds=5),
    quick=Settings(shape="micro", contexts=(48, 96), at_least=(None, None), rounds=2),
    measure=measure,
)

if __name__ == "__main__":
    main()
