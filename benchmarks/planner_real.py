"""The planner at work: requests that it decides on, beside loading everything and computing everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from time import perf_counter, sleep

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, greedy_for, make_llm
from kvkeep.cache import Chooser, Hierarchy
from kvkeep.config import CacheOptions
from kvkeep.llm import LLM
from kvkeep.spec import StoredKey
from kvkeep.tiers import Got, Host, Miss, Tier
from kvkeep.tiers.wrapper import TierWrapper

_LATENCY_S = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Every length of prompt with every speed of a throttled tier, over each shape cut to `layers`."""

    shapes: tuple[str, ...]
    layers: int
    lengths: tuple[int, ...]
    mb_per_s: tuple[int, ...]
    warmups: int
    rounds: int
    at_most: float | None


class Throttled(TierWrapper):
    """A tier that gives no more than `bytes_per_s`, one object after the other."""

    def __init__(self, tier: Tier, bytes_per_s: float) -> None:
        super().__init__(tier)
        self.bytes_per_s = bytes_per_s
        self._wire = Lock()

    def get(self, key: StoredKey, buffers: Sequence[memoryview]) -> Got | Miss:
        start = perf_counter()
        with self._wire:
            found = self.inner.get(key, buffers)
            num_bytes = sum(buffer.nbytes for buffer in buffers)
            sleep(max(0.0, _LATENCY_S + num_bytes / self.bytes_per_s - (perf_counter() - start)))
        return found


class ThrottledHost:
    """Settings of host memory behind a throttle, as fast as memory is at first."""

    kind = "host"
    name = None
    write_on = Host("2GB").write_on

    def open(self, name: str) -> Tier:
        """The tier; its speed may be changed at any time."""
        return Throttled(Host("2GB").open(name), 1e10)


def measure(run: Run, settings: Settings) -> None:
    """Each cell: the planner has seen a few requests like these; then all three, in turn."""
    ratios: list[float] = []
    for name in settings.shapes:
        model = build_model(name, torch.bfloat16, settings.layers)
        num_tokens = 2 * max(settings.lengths)
        with make_llm(
            model, num_tokens, tiers=[ThrottledHost()], idle_s=None, calibration_folder=None
        ) as llm:
            check_mode(run, llm)
            wire = below_of(llm).stack.tiers[0]
            assert isinstance(wire, Throttled)
            for speed in settings.mb_per_s:
                wire.bytes_per_s = speed * 1e6
                for length in settings.lengths:
                    ratios += _cell(run, settings, llm, name, speed, length)
    run.add(
        "worst: decided over the better of both", [max(ratios)], "times", at_most=settings.at_most
    )
    run.add("median: decided over the better of both", ratios, "times")


def _cell(
    run: Run, settings: Settings, llm: LLM, name: str, speed: int, length: int
) -> list[float]:
    below = below_of(llm)
    chooser = below.chooser
    prompt = random_prompt(SHAPES[name], length, (run.seed, name, speed, length))
    seconds: dict[str, list[float]] = {"load": [], "compute": [], "decided": []}
    for _ in range(settings.warmups):
        _first_token(llm, prompt, "decided", below, chooser)
    for number in range(settings.rounds + 1):
        for way in ("compute", "load", "decided"):
            took = _first_token(llm, prompt, way, below, chooser)
            if number:
                seconds[way].append(took)
    middle = {way: sorted(times)[len(times) // 2] for way, times in seconds.items()}
    ratio = middle["decided"] / min(middle["load"], middle["compute"])
    run.notes.append(
        f"{name}, {length} tokens, {speed} MB/s: load {middle['load']:.3g} s, compute "
        f"{middle['compute']:.3g} s, decided {middle['decided']:.3g} s"
    )
    return [ratio]


def _first_token(
    llm: LLM, prompt: list[int], way: str, below: Hierarchy, chooser: Chooser | None
) -> float:
    llm.cache.offload()
    below.chooser = chooser if way == "decided" else None
    start = perf_counter()
    llm.generate([prompt], greedy_for(1), cache=CacheOptions(read=way != "compute"))
    seconds = perf_counter() - start
    below.chooser = chooser
    return seconds


def below_of(llm: LLM) -> Hierarchy:
    """What lies below an engine's device."""
    below = llm.engine.cache._below
    assert below is not None
    return below


main = Script(
    name="planner_real",
    claim="What the planner decides takes at most 10 % longer than the better of loading and computing.",
    full=Settings(
        shapes=("qwen3-0.6b", "smollm2-1.7b"),
        layers=4,
        lengths=(256, 1024, 2048),
        mb_per_s=(20, 100, 500, 2000),
        warmups=4,
        rounds=3,
        at_most=1.10,
    ),
    quick=Settings(
        shapes=("micro",),
        layers=2,
        lengths=(64, 192),
        mb_per_s=(1, 100),
        warmups=1,
        rounds=2,
        at_most=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
