"""Is a kernel for linear layers right and fast enough here? A trial on the model's own weights.

Right: within the rounding of its result to bf16 of a product in float32. Fast enough: no slower than torch,
up to some number of rows. Both sides read other memory at every call, as in a step of a model.

Legend: M rows of x, X any leading dims of rows together, N outputs, K inputs, R outputs that are compared.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvkeep.hf.wide_linear import multiply_wide

__all__ = ["LinearChoice", "LinearKernels", "LinearTrials", "try_layers"]

_ROWS = (1, 2, 4, 8, 16, 32)
_ROUNDS = 7
# For many rows, the largest first: each costs milliseconds.
_WIDE_ROWS = (256, 128, 64)
_WIDE_ROUNDS = 3
# A product in float32 must be clearly faster: it also takes memory.
_WIDE_AT_LEAST = 1.05
# A large weight is raced in windows: memory, not the cache, must be what both sides wait for.
_WINDOW_BYTES = 4 << 20
_NUM_COMPARED = 256
# A bf16 number has 8 bits; a sum in float32 errs by 2^-24 of the magnitudes for each term of a lane.
_RESULT_ROUNDING = 2.0**-8
_SUM_ROUNDING = 2.0**-14


class LinearKernels(Protocol):
    """What computes a linear layer."""

    def linear(
        self, weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor, out_XN: Tensor, /
    ) -> None:
        """Compute out = x @ weight.T + bias for 1 to 32 rows; all bf16, contiguous, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearChoice:
    """The verdict for the layers of one shape.

    `most_rows` is the largest number of rows up to which the kernel serves them, 0 when torch does. From
    `wide_rows` rows on they are multiplied in float32, None when that is no faster here. Errors
    are the largest found against a float32 product, relative to its largest output: rounding to bf16 alone
    gives 0.002 to 0.004. `speed_up` is over torch at 1 row, None when a wrong kernel was not raced.
    """

    num_outputs: int
    num_inputs: int
    has_bias: bool
    num_layers: int
    most_rows: int
    error: float
    torch_error: float
    speed_up: float | None
    wide_rows: int | None = None


# A linear layer: weight, bias or None, and rows to the rows of the result.
Multiply = Callable[[Tensor, Tensor | None, Tensor], Tensor]

# What trials of the same kernels found, by (outputs, inputs, whether there is a bias).
LinearTrials = dict[tuple[int, int, bool], LinearChoice]


@torch.inference_mode()
def try_layers(kernels: LinearKernels, layers: Sequence[nn.Linear]) -> LinearChoice:
    """Compare, then race the kernel on layers of one shape, all bf16, contiguous and on the CPU."""
    weight, bias = layers[0].weight, layers[0].bias
    comparison = _compare(kernels, weight, bias)
    most_rows, speed_up = 0, None
    windows = cycle(_windows(layers))
    if comparison.is_right:
        for num_rows in _ROWS:
            ratio = _race(partial(_multiply, kernels), windows, num_rows, _ROUNDS)
            speed_up = speed_up or ratio
            if ratio < 1:
                break
            most_rows = num_rows
    return LinearChoice(
        num_outputs=weight.shape[0],
        num_inputs=weight.shape[1],
        has_bias=bias is not None,
        num_layers=len(layers),
        most_rows=most_rows,
        error=comparison.error,
        torch_error=comparison.torch_error,
        speed_up=speed_up,
        wide_rows=_fewest_wide_rows(windows),
    )


def _fewest_wide_rows(windows: Iterator[tuple[Tensor, Tensor | None]]) -> int | None:
    """The fewest rows from which products in float32 are faster than torch's, None where they are not."""
    fewest = None
    for num_rows in _WIDE_ROWS:
        if _race(multiply_wide, windows, num_rows, _WIDE_ROUNDS) < _WIDE_AT_LEAST:
            break
        fewest = num_rows
    return fewest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    is_right: bool
    error: float
    torch_error: float


def _compare(kernels: LinearKernels, weight: Tensor, bias: Tensor | None) -> _Comparison:
    """A few hundred outputs, spread over all, of every number of rows that is raced."""
    num_outputs = weight.shape[0]
    chosen_R = torch.linspace(0, num_outputs - 1, min(num_outputs, _NUM_COMPARED)).long()
    weight_RK = weight[chosen_R].float()
    bias_R = torch.zeros(len(chosen_R)) if bias is None else bias[chosen_R].float()
    x_MK = _random_rows(_ROWS[-1], weight.shape[1])
    exact_MR = F.linear(x_MK.float(), weight_RK, bias_R)
    magnitude_MR = F.linear(x_MK.float().abs(), weight_RK.abs(), bias_R.abs())
    allowed_MR = _RESULT_ROUNDING * exact_MR.abs() + _SUM_ROUNDING * magnitude_MR
    is_right, error = True, torch.tensor(0.0)
    largest = exact_MR.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    for num_rows in _ROWS:
        out_MR = _multiply(kernels, weight, bias, x_MK[:num_rows])[:, chosen_R].float()
        difference_MR = (out_MR - exact_MR[:num_rows]).abs()
        # Written so that NaN is wrong.
        is_right &= bool((difference_MR <= allowed_MR[:num_rows]).all())
        error = torch.maximum(error, difference_MR.max())
    torch_difference_MR = (F.linear(x_MK, weight, bias)[:, chosen_R].float() - exact_MR).abs()
    return _Comparison(
        is_right=is_right,
        error=(error / largest).item(),
        torch_error=(torch_difference_MR.max() / largest).item(),
    )


def _race(
    multiply: Multiply,
    windows: Iterator[tuple[Tensor, Tensor | None]],
    num_rows: int,
    num_rounds: int,
) -> float:
    """How many times longer torch takes."""
    ratios = []
    for number in range(num_rounds + 1):
        seconds = {}
        for is_ours in (True, False) if number % 2 else (False, True):
            weight, bias = next(windows)
            x_MK = _random_rows(num_rows, weight.shape[1])
            start = perf_counter()
            if is_ours:
                multiply(weight, bias, x_MK)
            else:
                F.linear(x_MK, weight, bias)
            seconds[is_ours] = perf_counter() - start
        if number:  # the first round warms up
            ratios.append(seconds[False] / seconds[True])
    return median(ratios)


def _multiply(kernels: LinearKernels, weight: Tensor, bias: Tensor | None, x_MK: Tensor) -> Tensor:
    out_MN = x_MK.new_empty((x_MK.shape[0], weight.shape[0]))
    kernels.linear(weight, bias, x_MK, out_MN)
    return out_MN


def _random_rows(num_rows: int, num_inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, num_inputs, generator=generator).bfloat16()


def _windows(layers: Sequence[nn.Linear]) -> list[tuple[Tensor, Tensor | None]]:
    """All layers cut into runs of outputs, the first run of each layer first."""
    num_outputs, num_inputs = layers[0].weight.shape
    size = min(num_outputs, max(1, _WINDOW_BYTES // (2 * num_inputs)))
    windows = []
    for start in range(0, num_outputs - size + 1, size):
        chosen = slice(start, start + size)
        for layer in layers:
            bias: Tensor | None = layer.bias
            windows.append((layer.weight[chosen], None if bias is None else bias[chosen]))
    return windows
