"""fp8: e4m3fn of a vector scaled to the format's range; steps grow with magnitude."""

import torch
from torch import Tensor

from kvkeep.codecs.base import Codec, Contract, Encoded, float_words, words_as_floats
from kvkeep.spec import KVFormat

__all__ = ["Fp8Codec"]

_MOST = 448.0
# What lies below would be a subnormal number, which kernels need not know how to read.
_SMALLEST_NORMAL = 2.0**-6


class Fp8Codec(Codec):
    """x = scale * e4m3fn(code), scale = largest magnitude / 448; no code is a subnormal number."""

    format = KVFormat.FP8
    contract = Contract.BOUNDED

    def encode(self, x_RD: Tensor) -> Encoded:
        x_RD = x_RD.float()
        scale_R1 = x_RD.abs().amax(dim=-1, keepdim=True) / _MOST
        is_usable = scale_R1.isfinite() & (scale_R1 > 0)
        y_RD = torch.where(is_usable, x_RD / scale_R1, 0.0).clamp(-_MOST, _MOST)
        small_RD = torch.where(y_RD.abs() > _SMALLEST_NORMAL / 2, _SMALLEST_NORMAL, 0.0)
        is_small = y_RD.abs() < _SMALLEST_NORMAL
        y_RD = torch.where(is_small, small_RD.copysign(y_RD), y_RD)
        scale_R1 = torch.where(scale_R1.isfinite(), scale_R1, torch.nan)
        codes_RD = y_RD.to(torch.float8_e4m3fn).view(torch.uint8)
        return Encoded(codes_RD, float_words(scale_R1))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        y_RD = encoded.codes_RD.contiguous().view(torch.float8_e4m3fn).float()
        return (y_RD * words_as_floats(encoded.metadata_R)).to(dtype)

    def error_bound(self, x_RD: Tensor) -> Tensor:
        """A sixteenth of each element, or half the smallest normal number where that is more.

        And what float32 adds: its roundings, and the scale's own where that is subnormal.
        """
        x_RD = x_RD.double().abs()
        scale_R1 = x_RD.amax(dim=-1, keepdim=True) / _MOST
        step_RD = torch.maximum(x_RD / 16, scale_R1 * _SMALLEST_NORMAL / 2)
        own_RD = x_RD * 2.0**-21 + _MOST * 2.0**-149
        bound_R: Tensor = (step_RD + own_RD).norm(dim=-1)
        return bound_R
