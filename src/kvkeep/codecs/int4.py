"""int4: sixteen equal steps from a rotated vector's minimum to its maximum."""

import torch
from torch import Tensor

from kvkeep.codecs.base import Codec, Contract, Encoded
from kvkeep.codecs.rotation import rotate, rotate_back, run_length
from kvkeep.spec import KVFormat

__all__ = ["Int4Codec"]

_MOST = 15
_LARGEST_HALF = 65504.0


class Int4Codec(Codec):
    """Rotated x = minimum + scale * code, codes 0 .. 15, scale and minimum in half precision.

    Covers vectors whose rotated elements lie within what half precision holds, 65504 to either side.
    """

    format = KVFormat.INT4
    contract = Contract.BOUNDED

    def encode(self, x_RD: Tensor) -> Encoded:
        y_RD = rotate(x_RD.float())
        low_R1, high_R1 = (y_RD.amin(dim=-1, keepdim=True), y_RD.amax(dim=-1, keepdim=True))
        is_finite = low_R1.isfinite() & high_R1.isfinite()
        # Plus zero: whether a minimum of zeros is 0 or -0 differs between machines.
        minimum_R1 = low_R1.clamp(-_LARGEST_HALF, _LARGEST_HALF).half() + 0.0
        scale_R1 = (high_R1 - minimum_R1.float()) / _MOST
        scale_R1 = scale_R1.clamp(0, _LARGEST_HALF).half() + 0.0
        steps_RD = (y_RD - minimum_R1.float()) / scale_R1.float()
        is_usable = is_finite & (scale_R1 > 0)
        code_RD = torch.where(is_usable, steps_RD, 0.0).round().clamp(0, _MOST)
        halves_R2 = torch.cat((scale_R1, minimum_R1), dim=-1)
        halves_R2 = torch.where(is_finite, halves_R2, torch.nan)
        return Encoded(code_RD.to(torch.uint8), halves_R2.view(torch.int32).squeeze(-1))

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        assert encoded.metadata_R is not None
        halves_R2 = encoded.metadata_R.contiguous().unsqueeze(-1).view(torch.float16).float()
        scale_R1, minimum_R1 = halves_R2.split(1, dim=-1)
        # Eleven bits times four are exact in float32, so that this rounds once, with or without FMA.
        return rotate_back(minimum_R1 + scale_R1 * encoded.codes_RD.float()).to(dtype)

    def error_bound(self, x_RD: Tensor) -> Tensor:
        """Half a step for each element of the rotated vector, and what half precision adds.

        That is half a unit of the minimum, and half a unit of the scale fifteen times over. The float32
        rotation adds less than a unit of the vector's length for each of its stages, there and back.
        """
        y_RD = rotate(x_RD.float()).double()
        low_R, high_R = y_RD.amin(dim=-1), y_RD.amax(dim=-1)
        step_R = (high_R - low_R) / _MOST
        half_unit = 2.0**-11
        minimum_R = (low_R.abs() * half_unit).clamp(min=2.0**-25)
        scale_R = (step_R * half_unit).clamp(min=2.0**-25) * _MOST
        num_stages = run_length(x_RD.shape[-1]).bit_length()
        length_R = x_RD.double().norm(dim=-1)
        own_R = 2 * (num_stages + 1) * 2.0**-23 * length_R
        bound_R: Tensor = x_RD.shape[-1] ** 0.5 * (step_R / 2 + minimum_R + scale_R)
        bound_R += own_R + 2.0**-140
        return bound_R
