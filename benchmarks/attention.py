"""Attention over paged K/V by the kernels, against torch over contiguous K/V and over a growing cache.

Legend: B requests, S positions, N blocks of a request, T tokens (one a request), H query heads, K key/value
heads, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.attention_sides import Case, Contiguous, Growing, Paged, sdpa
from benchmarks.harness import Paired, Run, Script, alternate
from benchmarks.paged import BLOCK_SIZE, Heads, PagedKV, kernels_here
from benchmarks.shapes import SHAPES
from kvkeep.native import Kernels

_NAME_TO_HEADS = {
    "1B": Heads("1B", 32, 8, 64),
    "8B": Heads("8B", 32, 8, 128),
    "1.7B": Heads("1.7B", 32, 32, 64),
    "micro": Heads("micro", 4, 2, 16),
}
# Of whose steps writing is a share.
_NAME_TO_MODEL = {
    "1B": SHAPES["llama-1b"],
    "8B": SHAPES["llama-8b"],
    "micro": SHAPES["micro"],
}
# Norm of the difference over norm of the result, beside float32 on the same K/V; results are bf16.
_NOISE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Each side's K/V fill `working_set_mb`, so that they come from memory each time.

    `at_least` has a row for each batch and in it a target for each format.
    """

    heads: tuple[str, ...]
    context: int
    batches: tuple[int, ...]
    formats: tuple[str, ...]
    working_set_mb: int
    rounds: int
    at_least: tuple[tuple[float | None, ...], ...]
    at_least_over_cat: float | None
    at_least_share: float | None
    sharing_heads: tuple[str, ...]
    sharing: int
    tail: int
    at_least_shared: float | None
    writes: tuple[int, ...]
    at_most_written: float | None


@torch.inference_mode()
def measure(run: Run, settings: Settings) -> None:
    """Every shape and batch in every format, then shared prefixes, then writing."""
    torch.manual_seed(run.seed)
    kernels = kernels_here()
    cases = [
        Case(_NAME_TO_HEADS[name], batch, settings.context)
        for name, batch in product(settings.heads, settings.batches)
    ]
    for case in cases:
        _compare(run, settings, kernels, case)
    for name in settings.sharing_heads:
        _share_prefix(run, settings, kernels, _NAME_TO_HEADS[name])
    for name in settings.heads:
        _time_writes(run, settings, kernels, _NAME_TO_HEADS[name])


def _compare(run: Run, settings: Settings, kernels: Kernels, case: Case) -> None:
    """One shape and batch: all formats against contiguous bf16, then bf16 against torch.cat."""
    kv, q_THD = case.kv(), case.q_THD()
    torch_side = Contiguous(case, kv, q_THD, settings.working_set_mb)
    targets = settings.at_least[settings.batches.index(case.batch)]
    for kv_format, at_least in zip(settings.formats, targets, strict=True):
        ours = Paged(kernels, case, kv_format, kv, q_THD, settings.working_set_mb)
        _check(run, case, kv_format, ours, kv, q_THD, torch_side)
        paired = _race(run, settings, torch_side.attend_all, ours.attend_all)
        what = f"{case.what}, {kv_format}"
        run.add(
            f"{what}: SDPA(enable_gqa) on contiguous bf16 over kernels",
            paired.first_over_second(),
            "times",
            at_least=at_least,
        )
        kernel_s = run.add(f"{what}: kernels", [1e3 * s for s in paired.second_s], "ms") / 1e3
        num_bytes = ours.paged.token_bytes * case.batch * case.context
        run.add(
            f"{what}: share of the read bandwidth",
            [num_bytes / s / 1e9 / run.rates().read_gb_per_s for s in paired.second_s],
            "share",
            at_least=settings.at_least_share
            if kv_format == "bfloat16" and case.batch > 1
            else None,
        )
        run.floor(
            what,
            num_bytes=num_bytes,
            operations=case.heads.operations(case.batch * case.context),
            measured_s=kernel_s,
        )
        if kv_format == "bfloat16":
            _compare_with_cat(run, settings, case, ours, kv, q_THD)


def _compare_with_cat(
    run: Run,
    settings: Settings,
    case: Case,
    ours: Paged,
    kv: tuple[Tensor, Tensor],
    q_THD: Tensor,
) -> None:
    """Append one token, then attend."""
    growing = Growing(case, kv, q_THD, settings.working_set_mb)
    paired = _race(run, settings, growing.attend_all, ours.append_all)
    run.add(
        f"{case.what}, bfloat16: DynamicCache (torch.cat) and SDPA over kernels",
        paired.first_over_second(),
        "times",
        at_least=settings.at_least_over_cat if case.batch > 1 else None,
    )


def _race(
    run: Run, settings: Settings, theirs: Callable[[], int], ours: Callable[[], int]
) -> Paired:
    """Seconds of one call of each side; a side makes many and says how many."""
    counts = [theirs(), ours()]
    budget_s = run.budget_s / (8 * len(settings.heads) * len(settings.batches))
    paired = alternate(
        lambda _: _ignore(theirs()),
        lambda _: _ignore(ours()),
        rounds=settings.rounds,
        budget_s=budget_s,
    )
    return Paired([s / counts[0] for s in paired.first_s], [s / counts[1] for s in paired.second_s])


def _ignore(_count: int) -> None:
    """A side that returns nothing is timed whole."""


def _check(
    run: Run,
    case: Case,
    kv_format: str,
    ours: Paged,
    kv: tuple[Tensor, Tensor],
    q_THD: Tensor,
    torch_side: Contiguous,
) -> None:
    """Both sides are within the noise of float32 on their own K/V; formats are what sets them apart."""
    found_THD = ours.attend()
    stored = [ours.paged.stored(table_N, case.context) for table_N in ours.tables_BN]
    exact_THD = torch.cat(
        [
            sdpa(q_HD[None, :, None].float(), k_KSD[None].float(), v_KSD[None].float())[:, :, 0]
            for q_HD, (k_KSD, v_KSD) in zip(q_THD, stored, strict=True)
        ]
    )
    theirs_THD = torch_side.attend()
    error, difference = _error(found_THD, exact_THD), _error(found_THD, theirs_THD)
    run.check(
        f"{case.what}, {kv_format}: kernels compute attention over what is stored",
        holds=error <= _NOISE,
        found=f"within {error:.2g}; {difference:.2g} from SDPA on bf16",
    )
    if kv_format == "bfloat16":
        run.check(
            f"{case.what}: SDPA and kernels agree",
            holds=difference <= 2 * _NOISE,
            found=f"within {difference:.2g}",
        )


def _error(found_THD: Tensor, exact_THD: Tensor) -> float:
    difference_THD = found_THD.float() - exact_THD.float()
    return float(difference_THD.norm() / exact_THD.float().norm())


def _share_prefix(run: Run, settings: Settings, kernels: Kernels, heads: Heads) -> None:
    """Requests with one prefix: its blocks shared, against a copy of them for each request."""
    num_blocks = -(-(settings.context + settings.tail) // BLOCK_SIZE)
    num_shared = settings.context // BLOCK_SIZE
    num_positions = settings.context + settings.tail
    case = Case(heads, settings.sharing, num_positions)
    num_layers = case.copies(settings.working_set_mb, heads.bytes_of(case.batch * num_positions))
    paged = PagedKV(kernels, heads, "bfloat16", num_layers, case.batch * num_blocks)
    tables_BN = torch.randperm(case.batch * num_blocks).view(case.batch, num_blocks)
    k_BSKD, v_BSKD = case.kv()
    for one_BSKD in (k_BSKD, v_BSKD):
        one_BSKD[:, : settings.context] = one_BSKD[:1, : settings.context].clone()
    paged.fill(list(tables_BN), k_BSKD, v_BSKD)
    # Each request's copy of the prefix takes its turn as the one that all share.
    shared = []
    for table_N in tables_BN:
        own_BN = tables_BN.clone()
        own_BN[:, :num_shared] = table_N[:num_shared]
        shared.append(paged.reads(list(own_BN), num_positions))
    copied = paged.reads(list(tables_BN), num_positions)
    q_THD = case.q_THD()
    what = f"{heads.name}, {case.batch} x ({settings.context} tokens shared + {settings.tail} own)"
    is_same = torch.equal(paged.attend(0, shared[0], q_THD), paged.attend(0, copied, q_THD))
    run.check(f"{what}: the same bits", holds=is_same)

    def attend_shared() -> int:
        for items, layer in product(shared, range(num_layers)):
            paged.attend(layer, items, q_THD)
        return len(shared) * num_layers

    def attend_copied() -> int:
        for layer in range(num_layers):
            paged.attend(layer, copied, q_THD)
        return num_layers

    paired = _race(run, settings, attend_copied, attend_shared)
    run.add(
        f"{what}: copies of the prefix over one",
        paired.first_over_second(),
        "times",
        at_least=settings.at_least_shared,
    )
    shared_ms = run.add(f"{what}: shared", [1e3 * s for s in paired.second_s], "ms")
    run.floor(
        what,
        num_bytes=paged.token_bytes * (settings.context + case.batch * settings.tail),
        operations=heads.operations(case.batch * num_positions),
        measured_s=shared_ms / 1e3,
    )


def _time_writes(run: Run, settings: Settings, kernels: Kernels, heads: Heads) -> None:
    """Writing a decode step's K/V in all layers, as a share of what the step takes at the very least."""
    model = _NAME_TO_MODEL[heads.name]
    step_s = run.rates().floor_s(num_bytes=model.weight_bytes(), operations=0)
    for num_tokens in settings.writes:
        what = f"{heads.name}, writing {num_tokens} new tokens in {model.layers} layers"
        format_to_s = {
            kv_format: _write_seconds(settings, kernels, heads, kv_format, num_tokens)
            for kv_format in settings.formats
        }
        for kv_format, seconds in format_to_s.items():
            run.add(f"{what}, {kv_format}", [1e3 * one for one in seconds], "ms")
        slowest = max(format_to_s, key=lambda kv_format: median(format_to_s[kv_format]))
        run.add(
            f"{what}, {slowest}: of the least time of a {model.name} step",
            [one / step_s for one in format_to_s[slowest]],
            "share",
            at_most=settings.at_most_written,
        )


def _write_seconds(
    settings: Settings, kernels: Kernels, heads: Heads, kv_format: str, num_tokens: int
) -> list[float]:
    """Seconds for one token of each of `num_tokens` requests, each time into other blocks."""
    layers = range(_NAME_TO_MODEL[heads.name].layers)
    block_bytes = PagedKV(kernels, heads, kv_format, len(layers), 1).token_bytes * BLOCK_SIZE
    num_steps = math.ceil(settings.working_set_mb * 2**20 / block_bytes / len(layers) / num_tokens)
    paged = PagedKV(kernels, heads, kv_format, len(layers), num_steps * num_tokens)
    k_TKD, v_TKD = torch.randn(2, num_tokens, heads.num_kv, heads.dim).bfloat16()
    places = [
        paged.places(blocks_T, torch.randint(BLOCK_SIZE, blocks_T.shape))
        for blocks_T in torch.randperm(num_steps * num_tokens).view(num_steps, num_tokens)
    ]
    seconds = []
    for slots in places:
        start = perf_counter()
        for layer in layers:
            paged.write(layer, slots, k_TKD, v_TKD)
        seconds.append(perf_counter() - start)
    return seconds


main = Script(
    name="attention",
    claim="Attention reads paged K/V where they lie, and faster than torch reads contiguous K/V.",
    full=Settings(
        heads=("1B", "8B"),
        context=4096,
        batches=(8, 1),
        formats=("bfloat16", "fp8", "int8", "int4", "k8v4"),
        working_set_mb=640,
        rounds=11,
        at_least=((2.5, 3.5, 3.5, 4.5, None), (2.5, 3.0, 3.0, 4.0, None)),
        at_least_over_cat=7.0,
        at_least_share=0.8,
        sharing_heads=("1B", "8B", "1.7B"),
        sharing=32,
        tail=64,
        at_least_shared=4.0,
        writes=(1, 8, 32),
        at_most_written=0.03,
    ),
    quick=Settings(
        heads=("micro",),
        context=100,
        batches=(2, 1),
        formats=("bfloat16", "int4"),
        working_set_mb=1,
        rounds=2,
        at_least=((None, None), (None, None)),
        at_least_over_cat=None,
        at_least_share=None,
        sharing_heads=("micro",),
        sharing=3,
        tail=5,
        at_least_shared=None,
        writes=(1, 3),
        at_most_written=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
