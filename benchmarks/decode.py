"""Decode steps and prefill of whole models: the engine against transformers with a DynamicCache.

Legend: B requests, S positions, T tokens, K key/value heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.harness import Run, Script, alternate
from benchmarks.shapes import SHAPES, Shape, build_model, random_prompt
from benchmarks.sides import (
    DecodeLoop,
    EngineSteps,
    check_mode,
    exact_model,
    generated,
    make_llm,
)
from kvkeep.arena import Slots
from kvkeep.llm import LLM
from kvkeep.spec import Span

# Steps before the ones that count.
_WARMUPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """`steps` decode steps of `batch` requests, each behind `context` tokens: full blocks, and the last."""

    batch: int
    context: int
    steps: int
    at_least: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Decode steps in lock-step, then first tokens of new prompts of `prefills` tokens in turn."""

    shape: str
    decodes: tuple[Decode, ...]
    prefills: tuple[int, ...]
    prefill_rounds: int
    prefill_at_least: float | None


@torch.inference_mode()
def measure(run: Run, settings: Settings) -> None:
    """Everything over one model and one engine, whose arena holds the largest batch."""
    torch.manual_seed(run.seed)
    _check_tokens(run, settings)
    batches = [one.batch * (one.context + one.steps + 64) for one in settings.decodes]
    llm = make_llm(build_model(settings.shape, torch.bfloat16), max([*batches, *settings.prefills]))
    check_mode(run, llm)
    for decode in settings.decodes:
        _compare_steps(run, settings, llm, decode)
    for num_tokens in settings.prefills:
        _compare_prefill(run, settings, llm, num_tokens)
    run.notes.append("what lies before a decode step is random K/V, the same for both sides")


def _compare_steps(run: Run, settings: Settings, llm: LLM, decode: Decode) -> None:
    shape, context = SHAPES[settings.shape], decode.context
    loop, steps = _both_sides(llm, shape, decode, (run.seed, "steps"))
    paired = alternate(
        lambda _: loop.step(),
        lambda _: steps.step(),
        rounds=decode.steps,
        warmups=_WARMUPS,
        budget_s=run.budget_s / (len(settings.decodes) + 2),
    )
    steps.close()
    what = f"decode step, {decode.batch} x {context}"
    run.add(
        f"{what}: bare DynamicCache loop over engine",
        paired.first_over_second(),
        "times",
        at_least=decode.at_least,
    )
    run.add(f"{what}: bare DynamicCache loop", paired.first_s, "s")
    engine_s = run.add(f"{what}: engine", paired.second_s, "s")
    run.floor(
        f"an engine's {what}",
        num_bytes=shape.weight_bytes() + shape.kv_bytes(context) * decode.batch,
        operations=shape.operations(context, context + 1) * decode.batch,
        measured_s=engine_s,
    )


def _compare_prefill(run: Run, settings: Settings, llm: LLM, num_tokens: int) -> None:
    shape = SHAPES[settings.shape]

    def prompt(number: int) -> list[int]:
        return random_prompt(shape, num_tokens, (run.seed, "prefill", num_tokens, number))

    paired = alternate(
        lambda number: _ignore(DecodeLoop(llm.model, [prompt(number)])),
        lambda number: _ignore(generated(llm, [prompt(number)], 1)),
        rounds=settings.prefill_rounds,
        warmups=0,
        budget_s=run.budget_s / (len(settings.decodes) + 2),
        at_least=2,
    )
    what = f"first token of {num_tokens}"
    run.add(
        f"{what}: model with DynamicCache over engine",
        paired.first_over_second(),
        "times",
        at_least=settings.prefill_at_least,
    )
    run.add(f"{what}: model with DynamicCache", paired.first_s, "s")
    engine_s = run.add(f"{what}: engine", paired.second_s, "s")
    run.floor(
        f"an engine's {what}",
        num_bytes=shape.weight_bytes(),
        operations=shape.operations(0, num_tokens),
        measured_s=engine_s,
    )


def _ignore(_result: object) -> None:
    """A side that returns nothing is timed whole."""


def _both_sides(
    llm: LLM, shape: Shape, decode: Decode, seed: object
) -> tuple[DecodeLoop, EngineSteps]:
    """Both sides behind the same random K/V: computing as many tokens would take minutes."""
    prompts = [
        random_prompt(shape, decode.context + 1, (seed, decode.batch, decode.context, row))
        for row in range(decode.batch)
    ]
    cache = DynamicCache(config=llm.model.config)
    _fill(llm, cache, [ids[:-1] for ids in prompts])
    steps = EngineSteps(llm, prompts, decode.steps + _WARMUPS + 8)
    loop = DecodeLoop(llm.model, [ids[-1:] for ids in prompts], cache)
    return loop, steps


def _fill(llm: LLM, cache: DynamicCache, prompts: Sequence[Sequence[int]]) -> None:
    """Put random K/V into a DynamicCache, and into the engine's cache as what it knows of the prompts."""
    spans = [Span(0, len(prompts[0]))]
    own, chains = llm.engine.cache, [llm.engine.chain(ids) for ids in prompts]
    leases = []
    for chain in chains:
        lease = own.reserve(chain)
        assert lease is not None
        assert lease.gaps == spans
        assert own.extend(lease, spans)
        leases.append(lease)
    _fill_layers(llm, cache, [lease.tables[0].held() for lease in leases], len(prompts[0]))
    for lease in leases:
        own.commit(lease, spans)
        lease.release()


def _fill_layers(
    llm: LLM, cache: DynamicCache, tables: Sequence[Sequence[int]], num_positions: int
) -> None:
    """Each request has the same random rows as the one before it, one position further."""
    spec, size = llm.installed.geometry.spec.groups[0], llm.settings.block_size
    arena, dtype = llm.installed.arenas.arenas[0], llm.model.dtype
    position_S = torch.arange(num_positions)
    slots = [Slots(torch.tensor(table)[position_S // size], position_S % size) for table in tables]
    for layer in range(len(spec.layers)):
        k_SKD = torch.randn(num_positions, spec.k_heads, spec.k_dim).to(dtype)
        v_SKD = torch.randn(num_positions, spec.v_heads, spec.v_dim).to(dtype)
        for row, of_row in enumerate(slots):
            arena.write(layer, of_row, k_SKD.roll(row, dims=0), v_SKD.roll(row, dims=0))
        cache.update(_rolled(k_SKD, len(slots)), _rolled(v_SKD, len(slots)), layer)


def _rolled(x_SKD: Tensor, num_rows: int) -> Tensor:
    """The rows of all requests as a model makes them, [B, K, S, D]."""
    return torch.stack([x_SKD.roll(row, dims=0).transpose(0, 1) for row in range(num_rows)])


def _check_tokens(run: Run, settings: Settings) -> None:
    """In float32 both sides go on alike behind the same K/V."""
    shape, size = SHAPES[settings.shape], 32
    decode = Decode(batch=3, context=2 * size, steps=6, at_least=None)
    llm = make_llm(exact_model(settings.shape), decode.batch * (decode.context + size))
    loop, steps = _both_sides(llm, shape, decode, (run.seed, "check"))
    wanted = [loop.next_B1]
    for _ in range(decode.steps):
        loop.step()
        steps.step()
        wanted.append(loop.next_B1)
    found = list(steps.tokens.values())
    steps.close()
    run.check(
        "behind the same random K/V both sides choose the same tokens in float32 (2 layers)",
        holds=found == torch.cat(wanted, dim=1).tolist(),
        found=f"{len(found)} x {len(found[0])} tokens, {len({t for row in found for t in row})} different",
    )


main = Script(
    name="decode",
    claim="A 1B model decodes faster than with a DynamicCache, the more so the more K/V it reads.",
    full=Settings(
        shape="llama-1b",
        decodes=(
            Decode(batch=1, context=512, steps=40, at_least=1.4),
            Decode(batch=8, context=4096, steps=16, at_least=2.0),
            Decode(batch=32, context=4096, steps=6, at_least=3.0),
        ),
        prefills=(512, 4096),
        prefill_rounds=3,
        prefill_at_least=1.0,
    ),
    quick=Settings(
        shape="micro",
        decodes=(
            Decode(batch=1, context=64, steps=3, at_least=None),
            Decode(batch=3, context=96, steps=3, at_least=None),
        ),
        prefills=(40,),
        prefill_rounds=2,
        prefill_at_least=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
