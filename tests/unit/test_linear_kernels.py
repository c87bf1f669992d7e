"""The kernel for linear layers with few rows: its numbers, with every instruction set.

Legend: M rows of x, X any leading dims, N outputs, K inputs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvkeep.errors import KernelError
from kvkeep.native import Isa, Kernels, KernelsAbsent, load_kernels
from kvkeep.native import library as native_library

SHAPES = [(1, 1), (3, 7), (31, 16), (33, 130), (64, 31), (65, 33), (257, 1023), (13, 2085)]


@pytest.fixture(params=list(Isa))
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The compiled kernels, with each instruction set that this machine has."""
    loaded = load_kernels()
    if isinstance(loaded, KernelsAbsent):
        pytest.skip(f"no compiled kernels: {loaded.reason}")
    before = loaded.isa
    if loaded.use_isa(request.param) != request.param:
        loaded.use_isa(before)
        pytest.skip(f"this machine has no {request.param.name}")
    yield loaded
    loaded.use_isa(before)


def random_layer(
    num_outputs: int, num_inputs: int, *, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight [N, K] and bias."""
    generator = torch.Generator().manual_seed(num_outputs)
    weight_NK = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    bias_N = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    return weight_NK, bias_N


def random_rows(num_rows: int, num_inputs: int) -> Tensor:
    """The first rows of always the same ones."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(40, num_inputs, generator=generator)[:num_rows].bfloat16()


def product(kernels: Kernels, weight_NK: Tensor, bias_N: Tensor | None, x_MK: Tensor) -> Tensor:
    """The kernel's result; what lies behind it in memory must stay as it is."""
    num_rows = x_MK.shape[0]
    out_MN = torch.full((num_rows + 1, weight_NK.shape[0]), 7.0, dtype=torch.bfloat16)
    kernels.linear(weight_NK, bias_N, x_MK, out_MN[:num_rows])
    assert (out_MN[num_rows] == 7.0).all()
    return out_MN[:num_rows]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SHAPES)
def test_a_result_is_a_float_product_rounded_once(
    kernels: Kernels, num_outputs: int, num_inputs: int, has_bias: bool
) -> None:
    """For 1 to 32 rows the error is half a unit of bf16, and what summing in float32 loses."""
    weight_NK, bias_N = random_layer(num_outputs, num_inputs, has_bias=has_bias)
    bias_or_0_N = torch.zeros(num_outputs).double() if bias_N is None else bias_N.double()
    for num_rows in (*range(1, 18), 20, 21, 24, 25, 31, 32):
        x_MK = random_rows(num_rows, num_inputs)
        exact_MN = F.linear(x_MK.double(), weight_NK.double(), bias_or_0_N)
        magnitude_MN = F.linear(x_MK.double().abs(), weight_NK.double().abs(), bias_or_0_N.abs())

        error_MN = (product(kernels, weight_NK, bias_N, x_MK) - exact_MN).abs()

        assert (error_MN <= 2**-8 * exact_MN.abs() + 2**-20 * magnitude_MN).all()


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [*SHAPES, (1024, 256), (160, 1024)])
def test_a_result_depends_on_its_own_row_only(
    kernels: Kernels, num_outputs: int, num_inputs: int
) -> None:
    """To the last bit, whatever the number of rows and of threads.

    The terms cancel each other, so that what is left shows in which order they were added.
    """
    weight_NK, _ = random_layer(num_outputs, num_inputs, has_bias=False)
    x_MK, half = random_rows(32, num_inputs), num_inputs // 2
    weight_NK[:, half : 2 * half] = -weight_NK[:, :half].flip(1)
    x_MK[:, half : 2 * half] = x_MK[:, :half].flip(1)
    x_MK[:, 2 * half :] = 0
    alone_MN = torch.cat([product(kernels, weight_NK, None, x_MK[m : m + 1]) for m in range(32)])
    for num_threads in (1, 2, 3, 7):
        kernels.num_threads = num_threads
        for num_rows in (*range(1, 18), 20, 21, 24, 25, 31, 32):
            out_MN = product(kernels, weight_NK, None, x_MK[:num_rows])

            assert torch.equal(out_MN, alone_MN[:num_rows])


def test_what_is_not_finite_stays_so(kernels: Kernels) -> None:
    """NaN and infinities of a row are in its outputs, and in no other's."""
    weight_NK, _ = random_layer(70, 65, has_bias=False)
    x_MK = random_rows(3, 65)
    x_MK[0, 64], x_MK[1, 64] = float("nan"), float("inf")

    out_MN = product(kernels, weight_NK, None, x_MK)

    assert out_MN[0].isnan().all()
    assert out_MN[1].isinf().all()
    assert out_MN[2].isfinite().all()


@pytest.mark.parametrize("leading", [(), (1,), (6,), (2, 3), (1, 3, 1, 2)])
def test_rows_of_a_linear_layer_may_have_any_leading_dims(
    kernels: Kernels, leading: tuple[int, ...]
) -> None:
    """They count together, and the result has the same ones."""
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(8, 4, generator=generator).bfloat16()
    x_XK = torch.randn(*leading, 4, generator=generator).bfloat16()
    out_XN = x_XK.new_empty(*leading, 8)

    kernels.linear(weight_NK, None, x_XK, out_XN)

    expected_XN = (x_XK.float() @ weight_NK.float().T).bfloat16()
    torch.testing.assert_close(out_XN, expected_XN)
    with pytest.raises(KernelError, match=r"x_XK .* out_XN"):
        kernels.linear(weight_NK, None, x_XK[None], out_XN)


def test_what_was_measured_is_the_librarys(kernels: Kernels, tmp_path: Path) -> None:
    """However often it is loaded; another file is another library."""
    again = load_kernels()
    assert isinstance(again, Kernels)
    again.use_isa(kernels.isa)

    assert again is not kernels
    assert again.linear_trials is kernels.linear_trials
    again.num_threads += 1
    assert again.linear_trials is not kernels.linear_trials
    assert native_library._measured(tmp_path) is not native_library._measured(tmp_path / "other")
