"""Every codec keeps the bound that it states, for any vector in its range."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvkeep.codecs import codec_of
from kvkeep.spec import KVFormat

# What half precision holds, also when a rotation gathers a whole vector in one element.
_MOST_OF_HALF = 65504.0
_MOST_OF_FLOAT = 2.0**125
FORMAT_TO_MOST = {
    KVFormat.FLOAT32: _MOST_OF_FLOAT,
    KVFormat.BFLOAT16: _MOST_OF_FLOAT,
    KVFormat.FLOAT16: _MOST_OF_HALF,
    KVFormat.FP8: _MOST_OF_FLOAT,
    KVFormat.INT8: _MOST_OF_FLOAT,
    KVFormat.INT4: _MOST_OF_HALF / 6,  # of vectors of up to 32 elements
}


def as_float32(value: float) -> float:
    """The nearest single precision number."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def elements(most: float) -> st.SearchStrategy[float]:
    """Numbers of every size up to `most`, zeros and subnormal ones included."""
    most = as_float32(most)
    wide = st.floats(-most, most, width=32, allow_subnormal=True)
    return st.one_of(wide, st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1e-45, most]))


def vectors(kv_format: KVFormat) -> st.SearchStrategy[Tensor]:
    """A vector of 8 to 32 elements that the format's range covers."""
    most = FORMAT_TO_MOST[kv_format]
    return st.sampled_from([8, 16, 24, 32]).flatmap(
        lambda dim: st.lists(elements(most), min_size=dim, max_size=dim).map(
            lambda numbers: torch.tensor([numbers])
        )
    )


@pytest.mark.parametrize("kv_format", list(KVFormat))
@given(data=st.data())
def test_no_vector_comes_back_further_off_than_the_bound(
    kv_format: KVFormat, data: st.DataObject
) -> None:
    """The distance between a vector and what is decoded, in double precision."""
    codec = codec_of(kv_format)
    x_1D = data.draw(vectors(kv_format))

    decoded_1D = codec.decode(codec.encode(x_1D), torch.float32)

    error = (decoded_1D.double() - x_1D.double()).norm().item()
    assert error <= codec.error_bound(x_1D).item()


@pytest.mark.parametrize("kv_format", list(KVFormat))
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 9), dim=st.sampled_from([64, 80, 128]))
def test_the_bound_holds_for_vectors_as_models_have_them(
    kv_format: KVFormat, seed: int, exponent: int, dim: int
) -> None:
    """Normal numbers of any size, with outliers; and the bound is no more than five times the error."""
    generator = torch.Generator().manual_seed(seed)
    x_RD = torch.randn(8, dim, generator=generator) * 2.0**exponent
    x_RD[:4, seed % dim] *= 15
    codec = codec_of(kv_format)

    decoded_RD = codec.decode(codec.encode(x_RD), torch.float32)

    error_R = (decoded_RD.double() - x_RD.double()).norm(dim=1)
    bound_R = codec.error_bound(x_RD)
    assert (error_R <= bound_R).all()
    # Below, half precision runs out of small numbers; exact formats have no error to compare with.
    if exponent > -8 and kv_format is not KVFormat.FLOAT32:
        assert bound_R.sum() <= 5 * error_R.sum()


@pytest.mark.parametrize("kv_format", [KVFormat.FP8, KVFormat.INT8])
@given(data=st.data())
def test_encoding_what_was_decoded_drifts_no_further_than_the_bound(
    kv_format: KVFormat, data: st.DataObject
) -> None:
    """A second round trip starts from the first one's result and keeps its own bound."""
    codec = codec_of(kv_format)
    first_1D = codec.decode(codec.encode(data.draw(vectors(kv_format))), torch.float32)

    second_1D = codec.decode(codec.encode(first_1D), torch.float32)

    error = (second_1D.double() - first_1D.double()).norm().item()
    assert error <= codec.error_bound(first_1D).item()
