"""What a running batch loses while blocks go down, or come up, beside it."""

from dataclasses import dataclass
from time import perf_counter

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, Shape, build_model, random_prompt
from benchmarks.sides import EngineSteps, check_mode, make_llm
from kvkeep.blocks import TokenChain
from kvkeep.llm import LLM
from kvkeep.tiers import Host

_BLOCK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A batch decodes; `moved_bytes` of K/V that others have left behind go down to memory beside it."""

    shape: str
    batch: int
    context: int
    steps: int
    moved_bytes: int
    rounds: int
    at_most: float | None


def measure(run: Run, settings: Settings) -> None:
    """Steps with nothing else to do, and steps while the blocks of a finished request go down, in turn."""
    shape = SHAPES[settings.shape]
    num_moved = settings.moved_bytes // shape.kv_bytes(1) // _BLOCK * _BLOCK
    num_steps = 2 * settings.rounds * settings.steps * 4
    num_tokens = settings.batch * (settings.context + num_steps) + num_moved
    tiers = [Host(settings.moved_bytes * 2)]
    model = build_model(settings.shape, torch.bfloat16)
    with make_llm(model, num_tokens, tiers=tiers, loading="always", idle_s=None) as llm:
        check_mode(run, llm)
        prompts = [
            random_prompt(shape, settings.context, (run.seed, row)) for row in range(settings.batch)
        ]
        batch = EngineSteps(llm, prompts, num_steps)
        ratios, moved = [], 0
        for number in range(settings.rounds):
            _settle(llm)
            quiet_s = _step_s(batch, settings.steps)
            moved += _leave_behind(llm, shape, num_moved, (run.seed, number))
            busy_s, num_busy = 0.0, 0
            while llm.engine.is_waiting or not num_busy:
                busy_s += _step_s(batch, 1)
                num_busy += 1
                if num_busy >= 4 * settings.steps:
                    break
            again_s = _quiet_after(llm, batch, settings.steps)
            ratios.append(busy_s / num_busy / ((quiet_s + again_s) / 2) - 1)
            run.notes.append(f"round {number}: {num_busy} steps while {num_moved} tokens went down")
        batch.close()
        run.add(
            f"a decode step of {settings.batch} x {settings.context} beside moves, longer by",
            [100 * ratio for ratio in ratios],
            "%",
            at_most=settings.at_most,
        )
        run.add("moved in each round", [moved / settings.rounds / 1e9], "GB")


def _step_s(batch: EngineSteps, num_steps: int) -> float:
    start = perf_counter()
    for _ in range(num_steps):
        batch.step()
    return (perf_counter() - start) / num_steps


def _quiet_after(llm: LLM, batch: EngineSteps, num_steps: int) -> float:
    _settle(llm)
    return _step_s(batch, num_steps)


def _settle(llm: LLM) -> None:
    while llm.engine.is_waiting:
        llm.engine.cache.wait(1.0)
        llm.engine.cache.poll()
    llm.cache.clear(tiers=True)


def _leave_behind(llm: LLM, shape: Shape, num_tokens: int, seed: object) -> int:
    """Blocks of a finished request, filled with whatever is there: computing them would take minutes."""
    cache = llm.engine.cache
    tokens = random_prompt(shape, num_tokens, ("left", seed))
    root = llm.engine.namespace(None).root_key()
    chain = TokenChain(root, cache.spec.block_size, tokens)
    lease = cache.reserve(chain, read=False)
    assert lease is not None, "no room"
    spans = tuple(lease.gaps)
    has_room = cache.extend(lease, spans)
    assert has_room
    cache.commit(lease, spans)
    lease.release()
    return shape.kv_bytes(num_tokens)


main = Script(
    name="moves_beside_decode",
    claim="A running batch decodes less than 5 % slower while 1 GB of K/V goes down beside it.",
    full=Settings(
        shape="qwen3-0.6b",
        batch=4,
        context=512,
        steps=20,
        moved_bytes=10**9,
        rounds=5,
        at_most=5.0,
    ),
    quick=Settings(
        shape="micro", batch=2, context=64, steps=4, moved_bytes=10**6, rounds=2, at_most=None
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
