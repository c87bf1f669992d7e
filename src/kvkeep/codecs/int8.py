"""int8: a vector's largest magnitude becomes 127, the rest follows in equal steps."""

import torch
from torch import Tensor

from kvkeep.codecs.base import Codec, Contract, Encoded, float_words, words_as_floats
from kvkeep.spec import KVFormat

__all__ = ["Int8Codec"]

_MOST = 127
# Codes are stored unsigned.
_ZERO = 128


class Int8Codec(Codec):
    """x = scale * code, codes -127 .. 127, scale = largest magnitude / 127."""

    format = KVFormat.INT8
    contract = Contract.BOUNDED

    def encode(self, x_RD: Tensor) -> Encoded:
        x_RD = x_RD.float()
        scale_R1 = x_RD.abs().amax(dim=-1, keepdim=True) / _MOST
        is_usable = scale_R1.isfinite() & (scale_R1 > 0)
        code_RD = torch.where(is_usable, x_RD / scale_R1, 0.0).round().clamp(-_MOST, _MOST)
        scale_R1 = torch.where(scale_R1.isfinite(), scale_R1, torch.nan)
        return Encoded((code_RD + _ZERO).to(torch.uint8), float_words(scale_R1))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        code_RD = encoded.codes_RD.float() - _ZERO
        return (code_RD * words_as_floats(encoded.metadata_R)).to(dtype)

    def error_bound(self, x_RD: Tensor) -> Tensor:
        """Half a step for each element: sqrt(D) / 254 of the largest magnitude.

        And what float32 adds: its roundings, and the scale's own where that is subnormal.
        """
        largest_R = x_RD.double().abs().amax(dim=-1)
        step_R = largest_R / _MOST
        own_R = largest_R * 2.0**-22 + _MOST * 2.0**-149
        bound_R: Tensor = x_RD.shape[-1] ** 0.5 * (step_R / 2 + own_R)
        return bound_R
