"""Codecs: the documented codes, the documented errors, and what happens at the ends of the number line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeep.codecs import Contract, Encoded, codec_of
from kvkeep.codecs.rotation import rotate, rotate_back, run_length, signs
from kvkeep.spec import KVFormat

FORMATS = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
QUANTISED = [item for item in KVFormat if item.is_quantised]
FLOATS = [item for item in KVFormat if not item.is_quantised]
# What a vector that cannot be encoded has for metadata and codes.
FORMAT_TO_NOTHING = {
    KVFormat.INT8: (0x7FC00000, 128),
    KVFormat.FP8: (0x7FC00000, 0),
    KVFormat.INT4: (0x7E007E00, 0),
}


def vectors(name: str) -> list[dict[str, Any]]:
    """The test vectors of docs/formats.md under a name."""
    blocks = re.findall(r"```json\n(.*?)```", FORMATS.read_text("utf-8"), re.DOTALL)
    (found,) = (parsed[name] for block in blocks if name in (parsed := json.loads(block)))
    return list(found)


def round_trip(kv_format: KVFormat, x_RD: Tensor) -> Tensor:
    """What comes back of float32 vectors."""
    codec = codec_of(kv_format)
    return codec.decode(codec.encode(x_RD), torch.float32)


def relative_error(x_RD: Tensor, y_RD: Tensor) -> float:
    """Root mean square of the difference over that of the vectors."""
    return float((x_RD - y_RD).norm() / x_RD.norm())


def words(encoded: Encoded) -> list[int]:
    """Metadata as unsigned integers."""
    assert encoded.metadata_R is not None
    return [word & 0xFFFFFFFF for word in encoded.metadata_R.tolist()]


@pytest.mark.parametrize("vector", vectors("codes"), ids=lambda vector: vector["format"])
def test_codes_are_those_of_the_documents(vector: dict[str, Any]) -> None:
    """Codes, metadata and decoded values of docs/formats.md, to the last bit."""
    codec = codec_of(KVFormat(vector["format"]))
    x_1D = torch.tensor([vector["x"]])

    encoded = codec.encode(x_1D)

    assert bytes(encoded.codes_RD.view(torch.uint8).flatten().tolist()).hex() == vector["codes"]
    if "metadata" in vector:
        assert f"{words(encoded)[0]:08x}" == vector["metadata"]
    decoded = codec.decode(encoded, torch.float32)
    assert decoded.view(torch.uint8).numpy().tobytes().hex() == vector["decoded"]


@pytest.mark.parametrize("vector", vectors("signs"), ids=lambda vector: vector["dim"])
def test_signs_are_those_of_the_documents(vector: dict[str, Any]) -> None:
    """Bits of SHA-256, lowest first, a set one for a minus."""
    negative = [sign < 0 for sign in signs(vector["dim"])]
    packed = [
        sum(bit << at for at, bit in enumerate(negative[byte : byte + 8]))
        for byte in range(0, len(negative), 8)
    ]

    assert bytes(packed).hex() == vector["bits"]


def test_int8_rounds_half_to_even() -> None:
    """With a scale of one, codes are the rounded elements plus 128."""
    x_1D = torch.tensor([[127.0, -127.0, 1.0, 0.5, 1.5, 2.5, -0.5, -1.5]])

    encoded = codec_of(KVFormat.INT8).encode(x_1D)

    assert encoded.codes_RD.tolist() == [[255, 1, 129, 128, 130, 130, 128, 126]]
    assert words(encoded) == [0x3F800000]


def test_fp8_rounds_half_to_even_and_writes_no_subnormal_number() -> None:
    """With a scale of one: ties, the ends of the range, and both sides of half the smallest normal number."""
    least = 2.0**-6
    x_1D = torch.tensor(
        [[448.0, -448.0, 17.0, 19.0, least, least / 2, least * 0.5001, -least * 0.9, -least * 0.4]]
    )

    encoded = codec_of(KVFormat.FP8).encode(x_1D)

    assert encoded.codes_RD.tolist() == [
        [0x7E, 0xFE, 0x58, 0x5A, 0x08, 0x00, 0x08, 0x88, 0x80],
    ]
    assert words(encoded) == [0x3F800000]


def test_int4_spans_from_minimum_to_maximum_of_the_rotated_vector() -> None:
    """A vector whose rotation is 3, 3.5, ..., 10.5 has codes 0 to 15, minimum 3, scale 0.5."""
    y_1D = 3 + torch.arange(16)[None] / 2

    encoded = codec_of(KVFormat.INT4).encode(rotate_back(y_1D))

    assert encoded.codes_RD.tolist() == [list(range(16))]
    assert words(encoded) == [0x42003800]


@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 128, 256])
def test_the_rotation_is_the_documented_matrix(dim: int) -> None:
    """H[i][j] is minus one to the number of bits that i and j share; runs do not mix."""
    length = run_length(dim)
    x_RD = torch.randn(3, dim, dtype=torch.float64)
    by_hand = [[(-1.0) ** (i & j).bit_count() for j in range(length)] for i in range(length)]
    h_MM = torch.tensor(by_hand, dtype=torch.float64)
    runs = (x_RD * torch.tensor(signs(dim))).view(3, -1, length)
    expected_RD = (runs @ h_MM.T / length**0.5).view(3, dim)

    rotated_RD = rotate(x_RD.float())

    torch.testing.assert_close(rotated_RD.double(), expected_RD, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rotate_back(rotated_RD), x_RD.float(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [24, 128])
def test_signs_are_mixed_and_differ_between_dims(dim: int) -> None:
    """Neither sign is rare, and another dim has signs of its own."""
    assert set(signs(dim)) == {1, -1}
    assert dim / 4 < signs(dim).count(1) < dim * 3 / 4
    assert signs(dim) != signs(2 * dim)[:dim]


@pytest.mark.parametrize(
    ("kv_format", "error"),
    [
        (KVFormat.FLOAT32, 0.0),
        (KVFormat.FLOAT16, 0.00021),
        (KVFormat.BFLOAT16, 0.00166),
        (KVFormat.INT8, 0.0064),
        (KVFormat.FP8, 0.0257),
        (KVFormat.INT4, 0.0996),
    ],
)
def test_errors_on_normal_vectors_are_the_known_ones(kv_format: KVFormat, error: float) -> None:
    """Root mean square over many vectors of 128 normal numbers, within four hundredths of itself."""
    x_RD = torch.randn(4096, 128)

    assert relative_error(x_RD, round_trip(kv_format, x_RD)) == pytest.approx(error, rel=0.04)


def test_the_rotation_is_what_lets_int4_bear_outliers() -> None:
    """Four elements fifteen times as large: rotated int4 keeps its error, plain int4 doubles it."""
    x_RD = torch.randn(512, 128)
    x_RD[:, [3, 40, 77, 100]] *= 15
    low_R1, high_R1 = x_RD.aminmax(dim=1, keepdim=True)
    step_R1 = (high_R1 - low_R1) / 15
    plain_RD = low_R1 + step_R1 * ((x_RD - low_R1) / step_R1).round()

    assert relative_error(x_RD, round_trip(KVFormat.INT4, x_RD)) < 0.12
    assert relative_error(x_RD, plain_RD) > 0.2


@pytest.mark.parametrize("kv_format", QUANTISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_becomes_nan_throughout(
    kv_format: KVFormat, bad: float
) -> None:
    """Metadata and codes are fixed bytes, every element is NaN, and the vector beside it is unharmed."""
    x_RD = torch.randn(2, 16)
    x_RD[0, 5] = bad
    codec = codec_of(kv_format)

    encoded = codec.encode(x_RD)

    metadata, code = FORMAT_TO_NOTHING[kv_format]
    assert words(encoded)[0] == metadata
    assert encoded.codes_RD[0].tolist() == [code] * 16
    decoded_RD = codec.decode(encoded, torch.float32)
    assert decoded_RD[0].isnan().all()
    assert torch.equal(decoded_RD[1:], round_trip(kv_format, x_RD[1:]))


@pytest.mark.parametrize("kv_format", QUANTISED)
@pytest.mark.parametrize("tiny", [0.0, -0.0, 1e-45])
def test_a_vector_of_nearly_nothing_becomes_zeros(kv_format: KVFormat, tiny: float) -> None:
    """A scale that rounds to zero means zeros: metadata 0, the codes of zero."""
    encoded = codec_of(kv_format).encode(torch.full((1, 8), tiny))

    assert words(encoded) == [0]
    assert encoded.codes_RD.tolist() == [[FORMAT_TO_NOTHING[kv_format][1]] * 8]
    decoded = codec_of(kv_format).decode(encoded, torch.float32)
    assert decoded.abs().max() == 0


@pytest.mark.parametrize(("kv_format", "code"), [(KVFormat.FP8, 0x7E), (KVFormat.INT8, 255)])
def test_a_scale_that_is_rounded_down_saturates(kv_format: KVFormat, code: int) -> None:
    """With a subnormal scale the largest element may lie beyond the largest code, and gets that code."""
    codec = codec_of(kv_format)
    most = 1.4 * (448 if kv_format is KVFormat.FP8 else 127) * 2.0**-149
    encoded = codec.encode(torch.tensor([[most] + [0.0] * 7]))

    assert words(encoded) == [1]
    assert encoded.codes_RD[0, 0] == code


def test_int4_beyond_half_precision_saturates() -> None:
    """What half precision cannot hold is clamped, finite, and the rest stays in order."""
    y_1D = torch.tensor([[-1e6, -70000.0, 0.0, 1e6] + [0.0] * 4])
    encoded = codec_of(KVFormat.INT4).encode(rotate_back(y_1D))

    assert words(encoded)[0] >> 16 == 0xFBFF  # -65504
    assert words(encoded)[0] & 0xFFFF == 0x7BFF  # 65504
    assert encoded.codes_RD[0, :4].tolist() == [0, 0, 1, 15]


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_a_vectors_codes_depend_on_that_vector_alone(kv_format: KVFormat) -> None:
    """The same codes alone, among others and in another order."""
    x_RD = torch.randn(9, 24)
    codec = codec_of(kv_format)
    together = codec.encode(x_RD)

    for at in range(9):
        alone = codec.encode(x_RD[at : at + 1])
        assert torch.equal(alone.codes_RD[0], together.codes_RD[at])
        if together.metadata_R is not None:
            assert alone.metadata_R is not None
            assert alone.metadata_R[0] == together.metadata_R[at]


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_rows_of_half_precision_are_encoded_as_the_same_numbers_in_float32(
    kv_format: KVFormat,
) -> None:
    """The dtype of rows has no part in codes; decoding rounds once, to the dtype asked for."""
    x_RD = torch.randn(5, 32).bfloat16()
    codec = codec_of(kv_format)

    encoded = codec.encode(x_RD)

    assert torch.equal(encoded.codes_RD, codec.encode(x_RD.float()).codes_RD)
    in_float32 = codec.decode(encoded, torch.float32)
    assert torch.equal(codec.decode(encoded, torch.bfloat16), in_float32.bfloat16())


@pytest.mark.parametrize("kv_format", FLOATS)
def test_floats_come_back_to_the_last_bit(kv_format: KVFormat) -> None:
    """Every number of the format's own dtype, infinities and zeros of both signs included, is kept."""
    dtype = getattr(torch, kv_format)
    x_RD = torch.randn(4, 8).to(dtype)
    x_RD[0, :4] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0])
    codec = codec_of(kv_format)

    back = codec.decode(codec.encode(x_RD), dtype)

    assert torch.equal(back.view(torch.uint8), x_RD.view(torch.uint8))


def test_contracts_are_declared() -> None:
    """Floats are exact against their precision, all else is bounded."""
    assert [codec_of(item).contract for item in FLOATS] == [Contract.EXACT] * 3
    assert [codec_of(item).contract for item in QUANTISED] == [Contract.BOUNDED] * 3
    assert [codec_of(item).format for item in KVFormat] == list(KVFormat)
