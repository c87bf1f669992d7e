"""The kernels that encode and decode rows, against plain torch: the same bytes, the same numbers."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from kvkeep.arena import NativeWordRows, Slots, WordArena
from kvkeep.native import Isa, Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import BlockId, GroupSpec, KVFormat, LayerFormat, LayerKind

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, NUM_TOKENS = 16, 5, 50
PAIRS = [LayerFormat(k, v) for k, v in product(KVFormat, KVFormat)]


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The kernels of one instruction set; skips where there are none, or not that one."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    before = found.isa
    try:
        if found.use_isa(request.param) is not request.param:
            pytest.skip(f"no {request.param.name.lower()} here")
        yield found
    finally:
        found.use_isa(before)


def vectors(heads: int, dim: int, *, has_nan: bool) -> Tensor:
    """Rows [T, K, D] of normal numbers, and among them every kind that a rule of an encoding is about."""
    x_TKD = torch.randn(NUM_TOKENS, heads, dim)
    x_TKD[0] = 0
    x_TKD[1] = -0.0
    x_TKD[2] *= 1e-41  # subnormal
    x_TKD[3] *= 1e4
    x_TKD[4, :, ::5] *= 30  # outliers
    x_TKD[5] = (x_TKD[5] * 8).round() / 8  # ties
    x_TKD[6] = -x_TKD[6].abs()
    x_TKD[7, :, 1:] *= 1e-4  # fp8 below its normal numbers
    x_TKD[8] = 2.5
    x_TKD[9, 0, 3] = torch.inf
    if has_nan:
        x_TKD[10, 0, 2] = torch.nan
    return x_TKD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_kernels_write_the_bytes_that_torch_writes(
    kernels: Kernels, pair: LayerFormat, dtype: torch.dtype
) -> None:
    """Twice at random slots of two layers; then both read the same, also where nobody wrote."""
    for k_dim, v_dim in ((24, 16), (128, 128), (80, 8)):
        spec = GroupSpec(
            name="g", kind=LayerKind.FULL, layers=(0, 1), k_heads=2, k_dim=k_dim, v_heads=2,
            v_dim=v_dim, itemsize=4, formats=(pair, LayerFormat(pair.v, pair.k)),
        )  # fmt: skip
        arenas = [
            WordArena(spec, BLOCK_SIZE, NUM_BLOCKS, dtype=dtype, device=CPU, rows_of=rows_of)
            for rows_of in (None, partial(NativeWordRows, kernels))
        ]
        for arena in arenas:
            arena.fill([BlockId(at) for at in range(NUM_BLOCKS)], float("nan"))
        for _, layer in product(range(2), range(2)):
            numbers_T = torch.randperm(BLOCK_SIZE * NUM_BLOCKS)[:NUM_TOKENS]
            slots = Slots(numbers_T // BLOCK_SIZE, numbers_T % BLOCK_SIZE)
            # Which NaN a conversion between floats makes is not defined, not even by torch.
            formats = spec.formats[layer]
            rows = [
                vectors(2, dim, has_nan=one.is_quantised).to(dtype)
                for one, dim in ((formats.k, k_dim), (formats.v, v_dim))
            ]
            for arena in arenas:
                arena.write(layer, slots, *rows)

        assert torch.equal(arenas[0].storage, arenas[1].storage)
        numbers_T = torch.randperm(BLOCK_SIZE * NUM_BLOCKS)
        slots = Slots(numbers_T // BLOCK_SIZE, numbers_T % BLOCK_SIZE)
        for layer in range(2):
            both = zip(arenas[0].read(layer, slots), arenas[1].read(layer, slots), strict=True)
            for ours, theirs in both:
                torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
