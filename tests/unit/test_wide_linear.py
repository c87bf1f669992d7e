"""Linear layers with many rows, multiplied in float32: the same numbers, and only where they pay.

Legend: B, T leading dims of x, X any leading dims, N outputs, K inputs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvkeep.hf import linear, wide_linear
from kvkeep.hf.hooks import running
from kvkeep.hf.linear import LinearChoice, install_linears
from kvkeep.hf.wide_linear import multiply_wide


def random_rows(num_rows: int, num_inputs: int) -> Tensor:
    """The first rows of always the same ones."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(20, num_inputs, generator=generator)[:num_rows].bfloat16()


class Few:
    """A kernel for few rows, which remembers how many they were."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def linear(
        self, weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor, out_XN: Tensor
    ) -> None:
        self.num_rows.append(x_XK.shape[:-1].numel())
        out_XN.copy_(F.linear(x_XK, weight_NK, bias_N))


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_multiplied_in_float32(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panel by panel, the last one smaller; the result is the float32 product rounded once."""
    monkeypatch.setattr(wide_linear, "_PANEL_BYTES", 4 * 48 * 100)
    layer, x_BTK = nn.Linear(48, 250, bias=bias).bfloat16(), random_rows(20, 48).view(2, 10, 48)
    own = layer.bias.float() if bias else None
    exact_BTN = F.linear(x_BTK.float(), layer.weight.float(), own)

    out_BTN = multiply_wide(layer.weight, layer.bias, x_BTK)

    assert out_BTN.dtype is torch.bfloat16
    torch.testing.assert_close(out_BTN, exact_BTN.bfloat16(), rtol=2**-7, atol=1e-5)


@torch.no_grad()
def test_a_step_takes_the_wide_way_from_its_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below them torch computes, or the kernel; outside of a step always torch."""
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48)).bfloat16()
    calls: list[int] = []

    def passed(_kernels: object, layers: list[nn.Linear]) -> LinearChoice:
        return LinearChoice(
            num_outputs=layers[0].out_features,
            num_inputs=layers[0].in_features,
            has_bias=True,
            num_layers=1,
            most_rows=4,
            error=0.0,
            torch_error=0.0,
            speed_up=2.0,
            wide_rows=8,
        )

    def wide(weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor) -> Tensor:
        calls.append(x_XK.shape[:-1].numel())
        return F.linear(x_XK, weight_NK, bias_N)

    monkeypatch.setattr(linear, "try_layers", passed)
    monkeypatch.setattr(linear, "multiply_wide", wide)
    few = Few()
    install_linears(model, few, {})
    model(random_rows(8, 48))
    assert calls == []
    with running():
        for num_rows in (4, 7, 8, 20):
            model(random_rows(num_rows, 48))

    assert calls == [8, 8, 20, 20]
    assert few.num_rows == [4, 4]
