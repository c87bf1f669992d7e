"""Linear layers while a step runs: bf16 weights on the CPU are multiplied in the fastest way there is here.

Few rows go to kvkeep's own kernel: what a layer computes for a row then depends on that row only, not on how
many are computed with it. Many rows are multiplied in float32 where that is faster: see wide_linear.

Legend: X leading dims of x, N outputs, K inputs.
"""

import copyreg
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvkeep.hf.hooks import is_running
from kvkeep.hf.linear_trial import LinearChoice, LinearKernels, LinearTrials, try_layers
from kvkeep.hf.wide_linear import multiply_wide

__all__ = [
    "LinearChoice",
    "LinearKernels",
    "LinearTrials",
    "PagedLinear",
    "install_linears",
    "uninstall_linears",
]

_ROUTE = "_kvkeep_route"


@dataclass(frozen=True, slots=True)
class _Route:
    """How a layer may be computed."""

    kernels: LinearKernels
    most_rows: int
    wide_rows: int | None

    def __deepcopy__(self, _memo: dict[int, Any]) -> "_Route":
        """Parametrised layers copy all they hold; kernels are no one's to copy."""
        return self


class PagedLinear(nn.Linear):
    """`nn.Linear` that a step computes in the way its route says; at all other times it is as before.

    Only `install_linears` makes one, by changing the class of a layer. Copies and pickles of it are plain
    layers: kernels belong to the process that installed them.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name is torch's
        route = self.__dict__.get(_ROUTE)
        if route is None or not is_running() or torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        # Not as attributes, which a module looks up slowly; a parametrised layer has no weight here.
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if weight is None or not _fits(weight, bias):
            return F.linear(input, self.weight, self.bias)
        num_outputs, num_inputs = weight.shape
        num_rows = _num_rows(input, num_inputs)
        if num_rows > route.most_rows:
            is_wide = route.wide_rows is not None and num_rows >= route.wide_rows
            return multiply_wide(weight, bias, input) if is_wide else F.linear(input, weight, bias)
        if not num_rows:
            return F.linear(input, weight, bias)
        out_XN = input.new_empty((*input.shape[:-1], num_outputs))
        route.kernels.linear(weight, bias, input.contiguous(), out_XN)
        return out_XN

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name != _ROUTE}
        # By what every Python has, so that a pickle can be read without kvkeep.
        return copyreg._reconstructor, (nn.Linear, object, None), state  # type: ignore[attr-defined]  # not in typeshed


def install_linears(
    model: nn.Module, kernels: LinearKernels, trials: LinearTrials
) -> list[LinearChoice]:
    """Try the kernel on every shape of layer, and let it serve those where it is right and no slower.

    Changes the class of the chosen layers until `uninstall_linears`. Shapes that are in `trials` are not
    tried again; the others are added. Returns one verdict for each shape, the refused ones included, in the
    order of the model. Takes well under a second.
    """
    shape_to_layers: dict[tuple[int, int, bool], list[nn.Linear]] = {}
    for layer in _layers(model):
        shape = (*layer.weight.shape, layer.bias is not None)
        shape_to_layers.setdefault(shape, []).append(layer)
    choices = []
    for shape, layers in shape_to_layers.items():
        if shape not in trials:
            trials[shape] = try_layers(kernels, layers)
        choice = replace(trials[shape], num_layers=len(layers))
        choices.append(choice)
        for layer in layers:
            if choice.most_rows or choice.wide_rows:
                layer.__class__ = PagedLinear
                layer.__dict__[_ROUTE] = _Route(kernels, choice.most_rows, choice.wide_rows)
            else:
                _uninstall(layer)
    return choices


def uninstall_linears(model: nn.Module) -> None:
    """Give every layer its class back; does nothing to a model without installed layers."""
    for module in model.modules():
        if isinstance(module, PagedLinear):
            _uninstall(module)


def _uninstall(layer: nn.Linear) -> None:
    layer.__dict__.pop(_ROUTE, None)
    # One that was parametrised since has a class of its own; without a route it computes as torch does.
    if type(layer) is PagedLinear:
        layer.__class__ = nn.Linear  # type: ignore[assignment]  # narrowed to what it is before


def _layers(model: nn.Module) -> Iterator[nn.Linear]:
    """Layers that are linear and nothing else: adapters, quantised and parametrised ones are subclasses."""
    for module in model.modules():
        if type(module) not in (nn.Linear, PagedLinear):
            continue
        assert isinstance(module, nn.Linear)
        # Old weight norms leave no parameter under this name.
        if module._parameters.get("weight") is not None and _fits(module.weight, module.bias):
            yield module


def _fits(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel can read a layer; asked at every call, since a model may be moved or converted."""
    return (
        type(weight) is nn.Parameter  # not one of a tensor subclass
        and weight.dtype is torch.bfloat16
        and weight.is_cpu
        and weight.is_contiguous()
        and weight.numel() > 0
        and (bias is None or (bias.dtype is torch.bfloat16 and bias.is_contiguous()))
    )


def _num_rows(x: Tensor, num_inputs: int) -> int:
    """The rows of x, 0 where it is not what a kernel can read."""
    if type(x) is not Tensor or x.dtype is not torch.bfloat16 or x.shape[-1] != num_inputs:
        return 0
    return x.numel() // num_inputs
