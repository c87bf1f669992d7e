"""What the cache costs when there is nothing to reuse."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.harness import Paired, Run, Script, alternate
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, exact_model, generated, make_llm
from kvkeep.config import CacheOptions

_OFF = CacheOptions(read=False, write=False)
_ON = CacheOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Prompts of `prompt` tokens, continued by `tokens`; `thin` is a shape that is almost only Python."""

    shape: str
    thin: str
    prompt: int
    tokens: int
    pairs: int
    thin_pairs: int
    at_most: float | None


def measure(run: Run, settings: Settings) -> None:
    """The same new prompt with the cache off and on, in turn, while blocks are evicted all the time."""
    _check_tokens(run, settings)
    thin = build_model(settings.thin, torch.float32)
    thin_s = _compare(run, settings, thin, settings.thin_pairs, budget_s=60)
    model = build_model(settings.shape, torch.bfloat16)
    paired = _compare(run, settings, model, settings.pairs, budget_s=max(30, run.budget_s - 60))
    run.add(
        "cache on over off, nothing to reuse: extra time",
        [ratio - 1 for ratio in paired.second_over_first()],
        "share",
        at_most=settings.at_most,
    )
    off_s = run.add("off, request", paired.first_s, "s")
    run.add("on, request", paired.second_s, "s")
    extra_s = [on - off for off, on in zip(thin_s.first_s, thin_s.second_s, strict=True)]
    run.add(f"on less off where a forward is almost free ({settings.thin})", extra_s, "s")
    run.add(
        "that difference over a request with the cache off",
        [extra / off_s for extra in extra_s],
        "share",
        at_most=settings.at_most,
    )
    run.notes.append(
        "the ratio of whole requests carries the machine's noise; the difference on a narrow model of as "
        "many layers and tokens is the same bookkeeping without it"
    )


def _compare(
    run: Run, settings: Settings, model: PreTrainedModel, pairs: int, *, budget_s: float
) -> Paired:
    # Both sides get the same prompts, which both shapes know.
    shape = min((SHAPES[settings.shape], SHAPES[settings.thin]), key=lambda one: one.vocabulary)
    # Room for two requests: from the third on every block must be evicted for another.
    room = 2 * (settings.prompt + settings.tokens)
    llm = make_llm(model, room, spare_tokens=128)
    check_mode(run, llm)

    def request(number: int, options: CacheOptions) -> None:
        prompt = random_prompt(shape, settings.prompt, (run.seed, number))
        generated(llm, [prompt], settings.tokens, options)

    paired = alternate(
        lambda number: request(number, _OFF),
        lambda number: request(number, _ON),
        rounds=pairs,
        warmups=2,
        budget_s=budget_s,
    )
    # Two random prompts may begin with the same token or two, which are shared as any prefix is.
    reused = llm.cache.stats().reused_tokens / settings.prompt / len(paired.first_s)
    run.check(
        "no request reused anything", holds=reused < 0.001, found=f"({reused:.2%} of its tokens)"
    )
    return paired


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompt = random_prompt(shape, settings.prompt, (run.seed, "check"))
    llm = make_llm(model, settings.prompt + 64)
    off = generated(llm, [prompt], 8, _OFF)
    on = generated(llm, [prompt], 8, _ON)
    run.check(
        "with the cache on and off the tokens are the same in float32 (2 layers)",
        holds=on == off,
        found=f"{len(on[0])} tokens, {len(set(on[0]))} different",
    )


main = Script(
    name="cache_overhead",
    claim="With nothing to reuse a request is at most 2 % slower with the cache than without.",
    full=Settings(
        shape="qwen3-0.6b",
        thin="thin",
        prompt=256,
        tokens=16,
        pairs=24,
        thin_pairs=40,
        at_most=0.02,
    ),
    quick=Settings(
        shape="micro", thin="micro", prompt=48, tokens=4, pairs=2, thin_pairs=2, at_most=None
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
