"""Floats kept as floats: what the format's precision can hold comes back to the last bit."""

import torch
from torch import Tensor

from kvkeep.codecs.base import Codec, Contract, Encoded
from kvkeep.spec import KVFormat

__all__ = ["FloatCodec"]

_FORMAT_TO_DTYPE = {
    KVFormat.FLOAT32: torch.float32,
    KVFormat.FLOAT16: torch.float16,
    KVFormat.BFLOAT16: torch.bfloat16,
}


class FloatCodec(Codec):
    """float32, float16 or bfloat16: rounding to nearest even where that is narrower than the rows.

    float16 holds up to 65504; what is larger becomes infinite.
    """

    contract = Contract.EXACT

    def __init__(self, kv_format: KVFormat) -> None:
        self.format = kv_format
        self.dtype = _FORMAT_TO_DTYPE[kv_format]

    def encode(self, x_RD: Tensor) -> Encoded:
        return Encoded(x_RD.to(self.dtype))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        return encoded.codes_RD.to(dtype)

    def error_bound(self, x_RD: Tensor) -> Tensor:
        """Half a unit in the last place of every element; nothing where no rounding is needed."""
        if torch.promote_types(x_RD.dtype, self.dtype) == self.dtype:
            return x_RD.new_zeros(x_RD.shape[0], dtype=torch.float64)
        precision = torch.finfo(self.dtype)
        x_RD = x_RD.double().abs()
        unit_RD = (x_RD * precision.eps).clamp(min=precision.smallest_normal * precision.eps)
        bound_R: Tensor = (unit_RD / 2).norm(dim=-1)
        return bound_R
