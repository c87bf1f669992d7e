"""Linear layers with many rows, for processors that multiply float32 faster than bf16.

The bf16 dot products of AVX-512 run at half the rate of float32 arithmetic, or less, on some processors. So
the weights become float32 a panel at a time, which stays in the cache, and the product is one in float32:
every product of two bf16 numbers is exact in it. A trial says whether that is quicker here.

Legend: X leading dims of rows, M rows, N outputs, K inputs, R outputs of one panel.
"""

import torch
from torch import Tensor

__all__ = ["multiply_wide"]

_PANEL_BYTES = 16 << 20


def multiply_wide(weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor) -> Tensor:
    """X @ weight.T + bias in float32, rounded to bf16 once; all bf16 and on the CPU, weights contiguous."""
    num_outputs, num_inputs = weight_NK.shape
    x_MK = x_XK.reshape(-1, num_inputs).float()
    out_MN = x_XK.new_empty((x_MK.shape[0], num_outputs))
    size = min(num_outputs, max(1, _PANEL_BYTES // (4 * num_inputs)))
    # Made once for all panels: fresh memory costs as much as the copy into it.
    panel_RK = torch.empty((size, num_inputs), dtype=torch.float32)
    product_MR = torch.empty((x_MK.shape[0], size), dtype=torch.float32)
    for start in range(0, num_outputs, size):
        stop = min(start + size, num_outputs)
        own_RK = panel_RK[: stop - start].copy_(weight_NK[start:stop])
        if stop - start == size:
            torch.mm(x_MK, own_RK.T, out=product_MR)
        else:
            product_MR = x_MK @ own_RK.T
        if bias_N is not None:
            product_MR += bias_N[start:stop]
        out_MN[:, start:stop] = product_MR
    return out_MN.view(*x_XK.shape[:-1], num_outputs)
