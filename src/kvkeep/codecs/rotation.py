"""The rotation that int4 applies before rounding: random signs, then a Walsh-Hadamard transform.

It spreads what is large over a whole vector, so that one outlier no longer sets the step of all others.
It is orthogonal, so scores and errors keep their size: q.k is the same when both are rotated.

Legend: R vectors, D elements of a vector, M elements of a run, the largest power of two that divides D.
"""

from functools import cache
from hashlib import sha256
from itertools import count

import torch
from torch import Tensor

__all__ = ["rotate", "rotate_back", "run_length", "signs"]

_MAGIC = b"kvkeep.rotation/1\0"


@cache
def signs(dim: int) -> tuple[int, ...]:
    """1 or -1 for each element: the bits of SHA-256, the lowest of a byte first; a set bit is -1.

    The i-th digest is that of a magic, `dim` and i, both uint32 little-endian (docs/formats.md).
    """
    bits: list[int] = []
    for at in count():
        digest = sha256(_MAGIC + dim.to_bytes(4, "little") + at.to_bytes(4, "little")).digest()
        bits += [byte >> bit & 1 for byte in digest for bit in range(8)]
        if len(bits) >= dim:
            break
    return tuple(1 - 2 * bit for bit in bits[:dim])


def run_length(dim: int) -> int:
    """The largest power of two that divides `dim`: elements that are mixed with each other."""
    return dim & -dim


def rotate(x_RD: Tensor) -> Tensor:
    """Float32 vectors, rotated: H(signs * x) / sqrt(M) of each run of M elements."""
    return _transform(x_RD * _signs_as(x_RD))


def rotate_back(y_RD: Tensor) -> Tensor:
    """The inverse of `rotate`: signs * H(y) / sqrt(M)."""
    return _transform(y_RD) * _signs_as(y_RD)


def _transform(x_RD: Tensor) -> Tensor:
    """H(x) / sqrt(M) in natural order: sums and differences over strides 1, 2, 4, ..., in float32.

    The order of additions is part of the format: codes must be the same everywhere.
    """
    num_rows, dim = x_RD.shape
    length = run_length(dim)
    stride = 1
    while stride < length:
        pairs = x_RD.reshape(num_rows, dim // (2 * stride), 2, stride)
        low, high = pairs.unbind(2)
        x_RD = torch.stack((low + high, low - high), dim=2).reshape(num_rows, dim)
        stride *= 2
    return x_RD * torch.tensor(length**-0.5, dtype=torch.float32).item()


def _signs_as(x_RD: Tensor) -> Tensor:
    return torch.tensor(signs(x_RD.shape[1]), dtype=x_RD.dtype, device=x_RD.device)
