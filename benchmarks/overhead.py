"""Where the time of a decode step goes when the model itself costs next to nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import thread_time
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness import BenchmarkError, Run, Script, alternate
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
    """Decode steps of `batches[i]` requests with `context` tokens each."""

    shape: str
    batches: tuple[int, ...]
    context: int
    steps: int


@dataclass(slots=True)
class _Phases:
    """Seconds spent in some calls, by name, since the last `take`; inner calls count twice."""

    spent: dict[str, float] = field(default_factory=dict)

    def watch(self, owner: object, attribute: str, name: str) -> None:
        """Time every call of `owner.attribute` from now on."""
        call = getattr(owner, attribute, None)
        if call is None:
            raise BenchmarkError(
                f"{type(owner).__name__} has no {attribute}; name its successor here"
            )
        object.__setattr__(owner, attribute, self.timing(call, name))

    def timing(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same callable, timed."""

        def timed_call(*args: Any, **kwargs: Any) -> object:
            start = thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + thread_time() - start

        return timed_call

    def take(self) -> dict[str, float]:
        """What was spent, and start anew."""
        spent, self.spent = self.spent, {}
        return spent


class _Timed:
    """Stands for an object whose one method is called through it."""

    def __init__(self, method: str, call: Callable[..., Any]) -> None:
        setattr(self, method, call)


def measure(run: Run, settings: Settings) -> None:
    """Decode steps of the engine, phase by phase, in turn with those of a DynamicCache."""
    _check_tokens(run, settings)
    model = build_model(settings.shape, torch.float32)
    # In float32, since products of small bfloat16 matrices take longer than all of the Python.
    # One thread, whose own time is counted: what else runs on the machine does not enter.
    torch.set_num_threads(1)
    for batch in settings.batches:
        _measure_batch(run, settings, model, batch)
    torch.set_num_threads(run.threads)
    run.notes += [
        "times are processor time of one thread; the model's arithmetic is in them, and is small",
        "phases are timed in steps of their own, since timing them costs a few µs",
        "forward holds the attention, inputs is what of running the model is not its forward",
    ]


def _measure_batch(run: Run, settings: Settings, model: PreTrainedModel, batch: int) -> None:
    shape = SHAPES[settings.shape]
    prompts = [
        random_prompt(shape, settings.context, (run.seed, batch, row)) for row in range(batch)
    ]
    llm = make_llm(model, batch * (settings.context + 2 * settings.steps + 64))
    if batch == settings.batches[0]:
        check_mode(run, llm)
    generated(llm, prompts, 1)
    steps = EngineSteps(llm, prompts, 2 * settings.steps + 64)
    loop = DecodeLoop(model, prompts)
    plain = alternate(
        lambda _: _own_time(loop.step),
        lambda _: _own_time(steps.step),
        rounds=settings.steps,
        warmups=3,
        budget_s=run.budget_s / len(settings.batches),
    )
    _add_us(run, f"batch {batch}: DynamicCache, step", plain.first_s)
    _add_us(run, f"batch {batch}: engine, step", plain.second_s)
    run.add(f"batch {batch}: engine over DynamicCache", plain.second_over_first(), "times")
    per_layer = [seconds / shape.layers for seconds in plain.first_s]
    _add_us(run, f"batch {batch}: DynamicCache, step per layer", per_layer)
    _add_phases(run, settings, batch, llm, steps)
    steps.close()


def _own_time(work: Callable[[], object]) -> float:
    start = thread_time()
    work()
    return thread_time() - start


def _add_phases(run: Run, settings: Settings, batch: int, llm: LLM, steps: EngineSteps) -> None:
    phases, engine = _Phases(), llm.engine
    paged = engine.installed.paged
    phases.watch(engine._scheduler, "plan", "plan")
    phases.watch(paged, "forward", "run")
    phases.watch(engine.cache, "commit", "commit")
    engine._sampler = _Timed("sample", phases.timing(engine._sampler.sample, "sample"))  # type: ignore[assignment]  # only sample is called
    object.__setattr__(paged, "model", phases.timing(paged.model, "forward"))
    laps: dict[str, list[float]] = {}
    for _ in range(settings.steps):
        phases.take()
        start = thread_time()
        steps.step()
        total = thread_time() - start
        spent = phases.take()
        spent["inputs"] = spent.pop("run") - spent["forward"]
        spent["rest"] = total - sum(spent.values())
        for name, seconds in spent.items():
            laps.setdefault(name, []).append(seconds)
    for name in ("plan", "inputs", "forward", "commit", "sample", "rest"):
        _add_us(run, f"batch {batch}: engine, {name}", laps[name])
    layers = SHAPES[settings.shape].layers
    per_layer = [seconds / layers for seconds in laps["forward"]]
    _add_us(run, f"batch {batch}: engine, forward per layer", per_layer)


def _add_us(run: Run, what: str, seconds: list[float]) -> None:
    run.add(what, [value * 1e6 for value in seconds], "µs")


def _check_tokens(run: Run, settings: Settings) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompts = [random_prompt(shape, settings.context, (run.seed, row)) for row in range(4)]
    wanted = static_batch(model, prompts, 8)
    found = generated(make_llm(model, 4 * (settings.context + 64)), prompts, 8)
    run.check(
        "engine and generate give the same tokens in float32 (2 layers)",
        holds=found == wanted,
        found=f"4 x 8 tokens, {len({token for row in wanted for token in row})} different",
    )


main = Script(
    name="overhead",
    claim="What the engine adds to a step in Python, by phase, beside a forward with a DynamicCache.",
    full=Settings(shape="thin", batches=(1, 32), context=64, steps=150),
    quick=Settings(shape="micro", batches=(1, 4), context=48, steps=4),
    measure=measure,
)

if __name__ == "__main__":
    main()
