"""The contract of codecs: how vectors become codes and metadata, and how far off they come back.

A vector is one token's keys or values of one head. Everything here is in canonical order, a row a vector;
where codes lie in a block is a layout's business. Legend: R vectors, D elements of a vector.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from kvkeep.spec import KVFormat

__all__ = ["Codec", "Contract", "Encoded", "float_words", "words_as_floats"]


class Contract(StrEnum):
    """What a codec promises of decode(encode(x))."""

    EXACT = "exact"  # x itself, rounded to the precision of the format
    BOUNDED = "bounded"  # off by no more than `error_bound(x)`, a function of the vector alone


@dataclass(frozen=True, slots=True)
class Encoded:
    """R vectors of one format.

    `codes_RD` has one code an element: uint8, 4 bits of it used by int4, or the floats themselves.
    `metadata_R` is int32, the words that docs/formats.md describes; None where the format has none.
    """

    codes_RD: Tensor
    metadata_R: Tensor | None = None


class Codec(Protocol):
    """One KV format. Pure: a vector's codes depend on that vector alone, on every machine and device."""

    format: KVFormat
    contract: Contract

    def encode(self, x_RD: Tensor) -> Encoded:
        """Codes of float vectors. Those of a vector with NaN or infinity decode to NaN throughout."""
        ...

    def decode(self, encoded: Encoded, dtype: torch.dtype) -> Tensor:
        """Vectors [R, D] in float32, rounded once to `dtype`."""
        ...

    def error_bound(self, x_RD: Tensor) -> Tensor:
        """The largest Euclidean distance between a vector and what float32 decoding makes of it, [R] float64.

        Holds for vectors of finite elements that the format's range covers.
        """
        ...


def float_words(scale_R1: Tensor) -> Tensor:
    """Float scales [R, 1] as metadata words [R]."""
    return scale_R1.contiguous().view(torch.int32).squeeze(-1)


def words_as_floats(metadata_R: Tensor | None) -> Tensor:
    """Float scales [R, 1] from metadata words [R]."""
    assert metadata_R is not None
    return metadata_R.contiguous().view(torch.float32).unsqueeze(-1)
