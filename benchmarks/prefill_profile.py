"""Where the time of a prefill goes: the engine's first token, operation by operation, beside its floor.

It explains what the comparisons with other engines show; see benchmarks/results/peers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Run, Script, timed
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, generated, make_llm

# The first that has a part of an operation's name takes it.
_KIND_TO_PARTS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention", "softmax"),
    "copies": ("copy", "aten::cat", "index", "clone"),
}
_REST = "element by element, and the rest"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """First tokens of new prompts of each of `prefills` tokens, `rounds` times."""

    shape: str
    prefills: tuple[int, ...]
    rounds: int


@torch.inference_mode()
def measure(run: Run, settings: Settings) -> None:
    """Each length by itself; the profiler's own time is in none of the shares."""
    torch.manual_seed(run.seed)
    llm = make_llm(build_model(settings.shape, torch.bfloat16), 2 * max(settings.prefills))
    check_mode(run, llm)
    shape = SHAPES[settings.shape]
    for num_tokens in settings.prefills:
        prompts = [
            random_prompt(shape, num_tokens, (run.seed, "profile", num_tokens, number))
            for number in range(2 * settings.rounds)
        ]
        seconds = [timed(partial(generated, llm, [ids], 1)) for ids in prompts[: settings.rounds]]
        what = f"first token of {num_tokens}"
        middle = run.add(what, seconds, "s")
        shares: dict[str, list[float]] = {}
        for ids in prompts[settings.rounds :]:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                generated(llm, [ids], 1)
            for kind, share in _shares(found.key_averages()).items():
                shares.setdefault(kind, []).append(share)
        for kind, values in shares.items():
            run.add(f"{what}: {kind}", values, "share")
        run.floor(
            what,
            num_bytes=shape.weight_bytes(),
            operations=shape.operations(0, num_tokens),
            measured_s=middle,
        )
    run.notes.append("shares are of the time inside operations, each without those it calls")


def _shares(events: Iterable[object]) -> dict[str, float]:
    """Share of each kind of operation in the time of all."""
    totals = dict.fromkeys([*_KIND_TO_PARTS, _REST], 0.0)
    for event in events:
        totals[_kind(str(event.key))] += float(event.self_cpu_time_total)  # type: ignore[attr-defined]
    whole = sum(totals.values())
    return {kind: total / whole for kind, total in totals.items()}


def _kind(name: str) -> str:
    return next(
        (kind for kind, parts in _KIND_TO_PARTS.items() if any(part in name for part in parts)),
        _REST,
    )


main = Script(
    name="prefill_profile",
    claim="Nearly all of a prefill is matrix products, near what the machine can multiply.",
    full=Settings(shape="llama-1b", prefills=(512, 4096), rounds=2),
    quick=Settings(shape="micro", prefills=(64,), rounds=1),
    measure=measure,
)

if __name__ == "__main__":
    main()
