"""How much sooner a chat that went down answers than one that is computed anew: memory, disk, a server."""

import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks.harness import Run, Script
from benchmarks.shapes import SHAPES, build_model, random_prompt
from benchmarks.sides import check_mode, exact_model, generated, greedy_for, make_llm
from kvkeep.llm import LLM
from kvkeep.tiers import Disk, Host, Remote, Tier, TierSettings
from tests.servers import RedisServer

_EVERYWHERE = ("finished", "reused", "idle", "evicted", "closing")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A chat of `context` tokens, `rounds` of them; the tiers hold one at a time."""

    shape: str
    context: int
    rounds: int
    capacity: str
    host_at_least: float | None
    disk_at_least: float | None
    remote_at_least: float | None


def measure(run: Run, settings: Settings) -> None:
    """Each round computes a chat once, and then takes it back from every tier, the others emptied."""
    with TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        tiers: list[TierSettings] = [
            Host(settings.capacity),
            Disk(Path(folder) / "disk", settings.capacity, write_on=_EVERYWHERE),
            Remote(server.url, write_on=_EVERYWHERE, timeout_s=10.0),
        ]
        options: dict[str, Any] = {"tiers": tiers, "loading": "always", "idle_s": None}
        _check_tokens(run, settings, options)
        model = build_model(settings.shape, torch.bfloat16)
        with make_llm(model, 2 * settings.context, **options) as llm:
            check_mode(run, llm)
            _measure(run, settings, llm)


def _measure(run: Run, settings: Settings, llm: LLM) -> None:
    shape = SHAPES[settings.shape]
    names = [tier.name for tier in tiers_of(llm)]
    cold_s: list[float] = []
    name_to_s: dict[str, list[float]] = {name: [] for name in names}
    for number in range(settings.rounds):
        prompt = random_prompt(shape, settings.context, (run.seed, "chat", number))
        llm.cache.clear(tiers=True)
        cold_s.append(_first_token(llm, prompt, "computed"))
        for at, name in enumerate(names):
            _only_in(llm, at)
            name_to_s[name].append(_first_token(llm, prompt, name))
    targets = (settings.host_at_least, settings.disk_at_least, settings.remote_at_least)
    for name, target in zip(names, targets, strict=False):
        ratios = [cold / warm for cold, warm in zip(cold_s, name_to_s[name], strict=True)]
        what = f"first token of {settings.context}: computed over loaded from {name}"
        run.add(what, ratios, "times", at_least=target)
    run.add(f"first token of {settings.context}, computed", cold_s, "s")
    num_bytes = shape.kv_bytes(settings.context)
    for name in names:
        run.add(f"first token of {settings.context}, from {name}", name_to_s[name], "s")
        speed = num_bytes / median(name_to_s[name]) / 1e9
        run.add(f"K/V over all that it took, from {name}", [speed], "GB/s")
    run.notes.append(
        "the pages of the disk's files were dropped from memory before every load; redis-server runs on the "
        "same cores"
    )


def _first_token(llm: LLM, prompt: list[int], source: str) -> float:
    """Seconds to the first token; its prompt must have come from where it was meant to."""
    start = perf_counter()
    output = llm.generate([prompt], greedy_for(1))[0]
    seconds = perf_counter() - start
    sources = output.receipt.tokens_by_source
    assert sources[source] > len(prompt) - 64, f"{sources} and not from {source}"
    return seconds


def _only_in(llm: LLM, at: int) -> None:
    """The device and all tiers but one have nothing."""
    llm.cache.offload()
    tiers = tiers_of(llm)
    for number, tier in enumerate(tiers):
        if number < at:
            tier.delete([one.key for one in tier.objects()])
    _drop_pages(tiers[1])


def _drop_pages(disk: Tier) -> None:
    folder = Path(disk.folder)  # type: ignore[attr-defined]
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tiers_of(llm: LLM) -> tuple[Tier, ...]:
    """The tiers below an engine, nearest first."""
    below = llm.engine.cache._below
    assert below is not None
    return below.stack.tiers


def _check_tokens(run: Run, settings: Settings, options: dict[str, Any]) -> None:
    model, shape = exact_model(settings.shape), SHAPES[settings.shape]
    prompt = random_prompt(shape, min(512, settings.context), (run.seed, "check"))
    with make_llm(model, 2 * len(prompt), **options) as llm:
        tokens = [generated(llm, [prompt], 8)]
        for at in range(len(tiers_of(llm))):
            _only_in(llm, at)
            tokens.append(generated(llm, [prompt], 8))
        run.check(
            "computed and loaded from every tier: the same tokens in float32 (2 layers)",
            holds=all(one == tokens[0] for one in tokens),
            found=f"{len(tokens)} x {len(tokens[0][0])}",
        )
        llm.cache.clear(tiers=True)


main = Script(
    name="offload",
    claim="A chat of 4,096 tokens answers 30x sooner from memory, 14x from disk, 10x from a server.",
    full=Settings(
        shape="qwen3-0.6b",
        context=4096,
        rounds=3,
        capacity="2GB",
        host_at_least=30,
        disk_at_least=14,
        remote_at_least=10,
    ),
    quick=Settings(
        shape="micro",
        context=192,
        rounds=2,
        capacity="64MB",
        host_at_least=None,
        disk_at_least=None,
        remote_at_least=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
