"""A chat behind a long system prompt: the first token of turn n with the cache, and without any reuse."""

from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, exact_model, generated, greedy_for, make_llm
from kvkeep.config import CacheOptions
from kvkeep.llm import LLM

_NO_REUSE = CacheOptions(read=False, write=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A system prompt, then turns of `asked` tokens that are answered with `answered` tokens.

    Only the turns of `compared` are computed without reuse too.
    """

    shape: str
    system: int
    turns: int
    asked: int
    answered: int
    compared: tuple[int, ...]
    last_at_least: float | None


def measure(run: Run, settings: Settings) -> None:
    """One conversation; each compared turn is computed anew right before the cache answers it."""
    shape = SHAPES[settings.shape]
    _check_tokens(run, settings)
    num_tokens = settings.system + settings.turns * (settings.asked + settings.answered)
    llm = make_llm(build_model(settings.shape, torch.bfloat16), 2 * num_tokens)
    check_mode(run, llm)
    history = random_prompt(shape, settings.system, (run.seed, "system"))
    for turn in range(1, settings.turns + 1):
        history = [*history, *random_prompt(shape, settings.asked, (run.seed, "turn", turn))]
        is_compared = turn in settings.compared
        cold_s = _first_token_s(llm, history, _NO_REUSE) if is_compared else 0.0
        start = perf_counter()
        answer = llm.stream(history, greedy_for(settings.answered))
        first = next(answer)
        warm_s = perf_counter() - start
        history = [*history, *first.token_ids]
        for piece in answer:
            history += piece.token_ids
        if is_compared:
            what = f"turn {turn}, {len(history)} tokens"
            run.add(f"{what}: with the cache", [warm_s], "s")
            run.add(f"{what}: without reuse", [cold_s], "s")
            target = settings.last_at_least if turn == settings.turns else None
            run.add(f"{what}: without reuse over with", [cold_s / warm_s], "times", at_least=target)
    run.notes.append(
        f"a system prompt of {settings.system} tokens, {settings.asked} asked and "
        f"{settings.answered} answered a turn; the first turn has nothing to reuse"
    )


def _first_token_s(llm: LLM, prompt: list[int], cache: CacheOptions) -> float:
    start = perf_counter()
    generated(llm, [prompt], 1, cache)
    return perf_counter() - start


def _check_tokens(run: Run, settings: Settings) -> None:
    llm = make_llm(exact_model(settings.shape), 1024)
    shape = SHAPES[settings.shape]
    prompt = random_prompt(shape, 200, (run.seed, "check"))
    longer = [*prompt, *generated(llm, [prompt], 8)[0], *prompt[:40]]
    warm, cold = generated(llm, [longer], 8), generated(llm, [longer], 8, _NO_REUSE)
    run.check(
        "a second turn with and without reuse: the same tokens in float32 (2 layers)",
        holds=warm == cold,
        found=f"{len(cold[0])} tokens",
    )


main = Script(
    name="chat_turns",
    claim="The first token of a late turn of a chat comes tens of times sooner than without reuse.",
    full=Settings(
        shape="qwen3-0.6b",
        system=2048,
        turns=20,
        asked=48,
        answered=32,
        compared=(2, 10, 20),
        last_at_least=10,
    ),
    quick=Settings(
        shape="micro",
        system=64,
        turns=3,
        asked=8,
        answered=8,
        compared=(1, 3),
        last_at_least=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
