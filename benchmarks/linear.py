"""What the kernel for linear layers brings at few rows, over torch and under the bandwidth of memory.

Legend: M rows of x, N outputs, K inputs.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import BenchmarkError, Paired, Run, Script, alternate
from benchmarks.shapes import SHAPES, Shape
from kvkeep.native import Kernels, KernelsAbsent, load_kernels

_LLAMA = Shape(
    name="llama-3.2-1b",
    hidden=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_dim=64,
    intermediate=8192,
    vocabulary=128256,
    context=131072,
    has_qk_norm=False,
)
_NAME_TO_SHAPE = {**SHAPES, _LLAMA.name: _LLAMA}

Matrix = tuple[int, int]
Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Weights of one shape fill `working_set_mb`, so that they come from memory each time."""

    shapes: tuple[str, ...]
    rows: tuple[int, ...]
    working_set_mb: int
    rounds: int
    at_least_share_1: float | None
    at_least_times_4: float | None


@dataclass(frozen=True, slots=True)
class _Key:
    matrix: Matrix
    num_rows: int


@torch.inference_mode()
def measure(run: Run, settings: Settings) -> None:
    """Every shape of matrix alone, then what its layers sum up to in a step of each model."""
    kernels = load_kernels()
    if isinstance(kernels, KernelsAbsent):
        raise BenchmarkError(f"there are no compiled kernels: {kernels.reason}")
    kernels.num_threads = run.threads
    run.notes.append(f"instruction set: {kernels.isa.name.lower()}")
    name_to_counts = {name: _matrices(_NAME_TO_SHAPE[name]) for name in settings.shapes}
    matrices = sorted({matrix for counts in name_to_counts.values() for matrix in counts})
    generator = torch.Generator().manual_seed(run.seed)
    num_weights = max(settings.working_set_mb * 2**19, *map(math.prod, matrices))
    pool = torch.randn(num_weights, generator=generator).bfloat16()
    budget_s = run.budget_s / (len(matrices) * len(settings.rows))
    key_to_pair = {
        key: _race(run, settings, kernels, pool, key, budget_s)
        for key in (_Key(*both) for both in product(matrices, settings.rows))
    }
    for name, num_rows in product(settings.shapes, settings.rows):
        _add_step(run, settings, name, name_to_counts[name], num_rows, key_to_pair)
    for key, pair in key_to_pair.items():
        what = f"{key.num_rows} rows, {key.matrix[0]}x{key.matrix[1]}"
        run.add(f"{what}: over F.linear", pair.first_over_second(), "times")
        run.add(f"{what}: kernel", _gb_per_s(_num_bytes(key.matrix), pair.second_s), "GB/s")
        run.add(f"{what}: F.linear", _gb_per_s(_num_bytes(key.matrix), pair.first_s), "GB/s")


def _race(
    run: Run, settings: Settings, kernels: Kernels, pool: Tensor, key: _Key, budget_s: float
) -> Paired:
    """Seconds of F.linear and of the kernel for one matrix, each time another one of the pool."""
    (num_outputs, num_inputs), num_rows = key.matrix, key.num_rows
    count = len(pool) // (num_outputs * num_inputs)
    weights = pool[: count * num_outputs * num_inputs].view(count, num_outputs, num_inputs).unbind()
    x_MK = torch.randn(num_rows, num_inputs).bfloat16()

    def ours(weight_NK: Tensor) -> Tensor:
        out_MN = x_MK.new_empty((num_rows, num_outputs))
        kernels.linear(weight_NK, None, x_MK, out_MN)
        return out_MN

    def theirs(weight_NK: Tensor) -> Tensor:
        return F.linear(x_MK, weight_NK)

    _check(run, key, x_MK, weights[-1], ours, theirs)
    pair = alternate(
        lambda _: _pass(theirs, weights),
        lambda _: _pass(ours, weights),
        rounds=settings.rounds,
        budget_s=budget_s,
    )
    return Paired([s / count for s in pair.first_s], [s / count for s in pair.second_s])


def _pass(multiply: Multiply, weights: Sequence[Tensor]) -> None:
    for weight_NK in weights:
        multiply(weight_NK)


def _check(
    run: Run, key: _Key, x_MK: Tensor, weight_NK: Tensor, ours: Multiply, theirs: Multiply
) -> None:
    """Both are within the rounding of a result to bf16 of a product in float32."""
    last = slice(-512, None)
    exact_MN = F.linear(x_MK.float(), weight_NK[last].float())
    allowed_MN = 2**-8 * exact_MN.abs() + 2**-14 * F.linear(
        x_MK.float().abs(), weight_NK[last].float().abs()
    )
    for name, multiply in (("kernel", ours), ("F.linear", theirs)):
        difference_MN = (multiply(weight_NK)[:, last] - exact_MN).abs()
        error = (difference_MN.max() / exact_MN.abs().max()).item()
        run.check(
            f"{name} of {key.num_rows} rows and {key.matrix[0]}x{key.matrix[1]} weights: a float32 product",
            holds=bool((difference_MN <= allowed_MN).all()),
            found=f"within {error:.2g} of the largest",
        )


def _add_step(
    run: Run,
    settings: Settings,
    name: str,
    counts: Counter[Matrix],
    num_rows: int,
    key_to_pair: dict[_Key, Paired],
) -> None:
    """What all linear layers of a model take in one step, summed up from its matrices."""
    pairs = [(count, key_to_pair[_Key(matrix, num_rows)]) for matrix, count in counts.items()]
    num_rounds = min(len(pair.first_s) for _, pair in pairs)
    step = Paired(
        [sum(count * pair.first_s[at] for count, pair in pairs) for at in range(num_rounds)],
        [sum(count * pair.second_s[at] for count, pair in pairs) for at in range(num_rounds)],
    )
    num_bytes = sum(count * _num_bytes(matrix) for matrix, count in counts.items())
    gb_per_s = _gb_per_s(num_bytes, step.second_s)
    what = f"all linear layers of {name}, {num_rows} rows"
    run.add(
        f"{what}: times as fast as F.linear",
        step.first_over_second(),
        "times",
        at_least=settings.at_least_times_4 if num_rows == 4 else None,
    )
    run.add(
        f"{what}: share of the read bandwidth",
        [one / run.rates().read_gb_per_s for one in gb_per_s],
        "share",
        at_least=settings.at_least_share_1 if num_rows == 1 else None,
    )
    run.add(f"{what}: kernel", gb_per_s, "GB/s")


def _matrices(shape: Shape) -> Counter[Matrix]:
    """The matrices that a step reads, and how often."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = Counter[Matrix]()
    for num_outputs, num_inputs in (
        (queries, shape.hidden),
        (keys, shape.hidden),
        (keys, shape.hidden),
        (shape.hidden, queries),
        (shape.intermediate, shape.hidden),
        (shape.intermediate, shape.hidden),
        (shape.hidden, shape.intermediate),
    ):
        layer[num_outputs, num_inputs] += shape.layers
    layer[shape.vocabulary, shape.hidden] += 1
    return layer


def _num_bytes(matrix: Matrix) -> int:
    return 2 * math.prod(matrix)


def _gb_per_s(num_bytes: int, seconds: Sequence[float]) -> list[float]:
    return [num_bytes / s / 1e9 for s in seconds]


main = Script(
    name="linear",
    claim="Linear layers of few rows read their weights at the speed of memory.",
    full=Settings(
        shapes=("qwen3-0.6b", "smollm2-1.7b", "llama-3.2-1b"),
        rows=(1, 4, 8, 16, 32),
        working_set_mb=640,
        rounds=7,
        at_least_share_1=0.85,
        at_least_times_4=1.3,
    ),
    quick=Settings(
        shapes=("micro",),
        rows=(1, 3),
        working_set_mb=1,
        rounds=2,
        at_least_share_1=None,
        at_least_times_4=None,
    ),
    measure=measure,
)

if __name__ == "__main__":
    main()
