"""The words layout against its documented addresses, and its arena against the codecs."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvkeep.arena import ArenaGroups, Slots, TorchWordRows, WordArena, WordLayout
from kvkeep.arena.arena import Arena
from kvkeep.codecs import codec_of
from kvkeep.errors import ConfigError
from kvkeep.spec import BlockId, GroupSpec, KVFormat, KVSpec, LayerFormat, LayerKind, with_format

CPU = torch.device("cpu")
FORMATS = Path(__file__).resolve().parents[2] / "docs" / "formats.md"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [LayerFormat(k, v) for k, v in product(KVFormat, KVFormat)]


def group_spec(*formats: LayerFormat, **shape: int) -> GroupSpec:
    """A group with a layer for each format, or one layer without."""
    sizes: dict[str, Any] = {"k_heads": 2, "k_dim": 24, "v_heads": 2, "v_dim": 16, "itemsize": 4}
    layers = tuple(range(10, 10 + max(1, len(formats))))
    return GroupSpec(
        name="g", kind=LayerKind.FULL, layers=layers, formats=formats, **(sizes | shape)
    )


def arena_of(spec: GroupSpec, block_size: int = 16, **options: object) -> WordArena:
    """Three poisoned blocks."""
    common: dict[str, Any] = {"dtype": torch.float32, "device": CPU}
    arena = WordArena(spec, block_size, 3, **(common | options))
    arena.fill([BlockId(at) for at in range(3)], float("nan"))
    return arena


def slots_of(numbers_T: Tensor, block_size: int = 16) -> Slots:
    """The slots of these numbers."""
    return Slots(numbers_T // block_size, numbers_T % block_size)


def stored(kv_format: KVFormat, x_TKD: Tensor) -> Tensor:
    """What is read of these rows once they are written, [T, K * D] in their dtype."""
    codec = codec_of(kv_format)
    encoded = codec.encode(x_TKD.reshape(-1, x_TKD.shape[2]))
    return codec.decode(encoded, x_TKD.dtype).view(len(x_TKD), -1)


def address(
    bits: int, *, is_keys: bool, size: int, dim: int, token: int, at: int
) -> tuple[int, int]:
    """Bit offset of element `at` of a token in a tile, and its nibble's shift: the words of the header."""
    per_word = 32 // bits
    across, along = (at, token) if is_keys else (token, at)
    word = across // per_word * (size if is_keys else dim) + along
    inside = across % per_word
    if bits == 4:
        return 4 * word + inside % 4, 4 * (inside // 4)
    return 4 * word + inside * bits // 8, 0


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_code_lies_at_its_documented_address(pair: LayerFormat) -> None:
    """Byte by byte: codes of keys and values of each head, and metadata behind them."""
    spec, size = group_spec(LayerFormat(KVFormat.INT8, KVFormat.INT8), pair), 8
    arena = arena_of(spec, size)
    k_TKD, v_TKD = torch.randn(size, 2, 24), torch.randn(size, 2, 16)
    arena.write(1, Slots(torch.full((size,), 2), torch.arange(size)), k_TKD, v_TKD)
    block = bytes(arena.block(BlockId(2)).tolist())

    start = arena.layout.layer_offset(1)
    assert start == size * (2 * (24 + 4) + 2 * (16 + 4))
    for kv_format, x_TKD, is_keys in ((pair.k, k_TKD, True), (pair.v, v_TKD, False)):
        dim = x_TKD.shape[2]
        for head in range(2):
            encoded = codec_of(kv_format).encode(x_TKD[:, head])
            codes = encoded.codes_RD.contiguous().view(torch.uint8).view(size, dim, -1).tolist()
            for token, at in product(range(size), range(dim)):
                place = {"is_keys": is_keys, "size": size, "dim": dim, "token": token, "at": at}
                offset, shift = address(kv_format.bits, **place)  # type: ignore[arg-type]
                found = block[start + offset : start + offset + len(codes[token][at])]
                if kv_format is KVFormat.INT4:
                    found = bytes([found[0] >> shift & 15])
                assert list(found) == codes[token][at]
            start += size * dim * kv_format.bits // 8
            if encoded.metadata_R is not None:
                metadata = encoded.metadata_R.numpy().astype("<i4").tobytes()
                assert block[start : start + 4 * size] == metadata
                start += 4 * size
    assert start == len(block)


def test_blocks_are_those_of_the_documents() -> None:
    """The example blocks of docs/formats.md: eight tokens of one head of eight."""
    texts = re.findall(r"```json\n(.*?)```", FORMATS.read_text("utf-8"), re.DOTALL)
    (vectors,) = (parsed["blocks"] for text in texts if "blocks" in (parsed := json.loads(text)))
    t_T1, d_1D = torch.arange(8)[:, None], torch.arange(8)[None]
    k_TD, v_TD = ((5 * t_T1 + 3 * d_1D) % 16 - 8) / 4, ((3 * t_T1 + 7 * d_1D) % 16 - 8) / 4

    assert len(vectors) >= 3
    for vector in vectors:
        pair = LayerFormat(KVFormat(vector["k_format"]), KVFormat(vector["v_format"]))
        arena = arena_of(group_spec(pair, k_heads=1, k_dim=8, v_heads=1, v_dim=8), 8)
        arena.write(0, slots_of(torch.arange(8), 8), k_TD, v_TD)
        parts = [vector[part] for part in ("keys", "values")]
        expected = "".join(part["codes"] + part.get("metadata", "") for part in parts)
        assert bytes(arena.block(BlockId(0)).tolist()).hex() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_what_is_read_is_what_the_codec_makes_of_what_was_written(
    pair: LayerFormat, dtype: torch.dtype
) -> None:
    """Random slots in two writes, the second over some of the first; all else stays NaN."""
    spec = group_spec(pair, LayerFormat(pair.v, pair.k))
    arena = arena_of(spec, dtype=dtype)
    expected_k, expected_v = torch.full((48, 48), torch.nan), torch.full((48, 32), torch.nan)
    expected_k, expected_v = expected_k.to(dtype), expected_v.to(dtype)
    for count in (30, 17):
        slots_T = torch.randperm(48)[:count]
        k_TKD, v_TKD = torch.randn(count, 2, 24).to(dtype), torch.randn(count, 2, 16).to(dtype)
        arena.write(1, slots_of(slots_T), k_TKD, v_TKD.flatten(1))
        expected_k[slots_T] = stored(pair.v, k_TKD)
        expected_v[slots_T] = stored(pair.k, v_TKD)

    order_T = torch.randperm(48)
    for read in (arena.read, arena.borrow):
        k_TW, v_TW = read(1, slots_of(order_T))
        assert k_TW.dtype == v_TW.dtype == dtype
        torch.testing.assert_close(k_TW, expected_k[order_T], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(v_TW, expected_v[order_T], rtol=0, atol=0, equal_nan=True)
    other_k, other_v = arena.read(0, slots_of(order_T))
    assert other_k.isnan().all()
    assert other_v.isnan().all()


@given(
    st.tuples(*[st.sampled_from(list(KVFormat))] * 2),
    st.integers(1, 3),
    st.sampled_from([8, 24, 40]),
    st.sampled_from([8, 32]),
    st.sampled_from([8, 16, 32]),
    st.integers(0, 2**31),
)
def test_any_shape_reads_back_at_any_slots(
    pair: tuple[KVFormat, KVFormat], heads: int, k_dim: int, v_dim: int, size: int, seed: int
) -> None:
    """Tokens one at a time and many at once give the same bytes, and the values of the codec."""
    torch.manual_seed(seed)
    spec = group_spec(LayerFormat(*pair), k_heads=heads, v_heads=heads, k_dim=k_dim, v_dim=v_dim)
    at_once, one_by_one = arena_of(spec, size), arena_of(spec, size)
    slots_T = torch.randperm(3 * size)[: 2 * size]
    k_TKD, v_TKD = torch.randn(2 * size, heads, k_dim), torch.randn(2 * size, heads, v_dim)

    at_once.write(0, slots_of(slots_T, size), k_TKD, v_TKD)
    for at in range(2 * size):
        one = slice(at, at + 1)
        one_by_one.write(0, slots_of(slots_T[one], size), k_TKD[one], v_TKD[one])

    assert torch.equal(at_once.storage, one_by_one.storage)
    k_TW, v_TW = at_once.read(0, slots_of(slots_T, size))
    assert torch.equal(k_TW, stored(pair[0], k_TKD))
    assert torch.equal(v_TW, stored(pair[1], v_TKD))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_canonical_order_is_head_token_dim_and_comes_back(pair: LayerFormat) -> None:
    """Codes [head][token][dim], two of four bits in a byte, then metadata [head][token]."""
    spec = group_spec(pair, pair)
    arena = arena_of(spec, 8)
    slots = Slots(torch.ones(8, dtype=torch.long), torch.arange(8))
    expected = b""
    for layer in range(2):
        rows = torch.randn(8, 2, 24), torch.randn(8, 2, 16)
        arena.write(layer, slots, *rows)
        for kv_format, x_TKD in zip((pair.k, pair.v), rows, strict=True):
            encoded = codec_of(kv_format).encode(x_TKD.transpose(0, 1).flatten(0, 1))
            codes = encoded.codes_RD.view(torch.uint8).flatten().tolist()
            if kv_format is KVFormat.INT4:
                codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
            expected += bytes(codes)
            if encoded.metadata_R is not None:
                expected += encoded.metadata_R.numpy().astype("<i4").tobytes()
    block_B = arena.block(BlockId(1))

    canonical_B = arena.layout.to_canonical(block_B)

    assert bytes(canonical_B.tolist()) == expected
    assert torch.equal(arena.layout.from_canonical(canonical_B), block_B)


@pytest.mark.parametrize("kv_format", list(KVFormat))
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (2, 64, 64), (8, 128, 128), (3, 192, 128), (1, 576, 8)]
)
@pytest.mark.parametrize("size", [8, 32])
def test_allocated_bytes_are_those_of_the_spec(
    kv_format: KVFormat, shape: tuple[int, int, int], size: int
) -> None:
    """Nothing beside the blocks is allocated, in uniform and in mixed formats."""
    heads, k_dim, v_dim = shape
    pairs = LayerFormat(kv_format, kv_format), LayerFormat(kv_format, KVFormat.INT4)
    spec = group_spec(*pairs, k_heads=heads, v_heads=heads, k_dim=k_dim, v_dim=v_dim)
    arena = arena_of(spec, size)

    assert arena.num_bytes == arena.storage.nbytes == 3 * spec.block_bytes(size)
    assert arena.block(BlockId(1)).nbytes == spec.block_bytes(size)
    assert arena.layout.values(1).stop == spec.block_bytes(size) == size * spec.bytes_per_token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_without_format_keep_every_bit(dtype: torch.dtype) -> None:
    """Any bits of the model's dtype come back, those of NaN and infinity included."""
    spec = group_spec(itemsize=dtype.itemsize)
    arena = arena_of(spec, dtype=dtype)
    k_TW, v_TW = (
        torch.randint(0, 256, (20, width * dtype.itemsize), dtype=torch.uint8).view(dtype)
        for width in (48, 32)
    )
    slots = slots_of(torch.randperm(48)[:20])
    arena.write(0, slots, k_TW, v_TW)

    for got_TW, x_TW in zip(arena.read(0, slots), (k_TW, v_TW), strict=True):
        assert torch.equal(got_TW.view(torch.uint8), x_TW.view(torch.uint8))
    assert arena.num_bytes == 3 * spec.block_bytes(16)
    assert arena.layout.name == "words/1"


def test_tokens_that_share_a_byte_both_arrive() -> None:
    """Four-bit values of tokens 0 and 4 lie in one byte: written together, or one over what was there."""
    spec = group_spec(LayerFormat(KVFormat.INT4, KVFormat.INT4))
    arena = arena_of(spec)
    rows = [(torch.randn(2, 2, 24), torch.randn(2, 2, 16)) for _ in range(2)]
    arena.write(0, slots_of(torch.tensor([4, 0])), *rows[0])
    arena.write(0, slots_of(torch.tensor([20, 4])), *rows[1])

    k_TW, v_TW = arena.read(0, slots_of(torch.tensor([0, 4, 20])))

    for got, at in ((k_TW, 0), (v_TW, 1)):
        first, second = (stored(KVFormat.INT4, both[at]) for both in rows)
        assert torch.equal(got, torch.stack((first[1], second[1], second[0])))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_poisoned_block_reads_as_nan_and_others_do_not(pair: LayerFormat) -> None:
    """Every byte is 0xFF, and what was written elsewhere, or later, is intact."""
    arena = arena_of(group_spec(pair))
    everything = slots_of(torch.arange(48))
    arena.write(0, everything, torch.randn(48, 2, 24), torch.randn(48, 2, 16))

    arena.fill([BlockId(1)], float("nan"))

    assert (arena.block(BlockId(1)) == 0xFF).all()
    for part_TW in arena.read(0, everything):
        assert part_TW.view(3, -1).isnan().all(dim=1).tolist() == [False, True, False]
        assert part_TW.view(3, -1).isnan().any(dim=1).tolist() == [False, True, False]
    arena.write(0, slots_of(torch.tensor([17])), torch.randn(1, 2, 24), torch.randn(1, 2, 16))
    assert not any(part.isnan().any() for part in arena.read(0, slots_of(torch.tensor([17]))))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_filled_block_reads_as_its_value(pair: LayerFormat) -> None:
    """As near as the format comes, in every layer; zeros are zeros."""
    arena = arena_of(group_spec(pair, pair))

    arena.fill([BlockId(0), BlockId(2)], 1.5)
    arena.fill([BlockId(1)], 0.0)

    for layer in range(2):
        for part_TW in arena.read(layer, slots_of(torch.arange(48))):
            first, zeros, last = part_TW.view(3, -1)
            assert (torch.cat((first, last)) - 1.5).abs().max() < 0.5
            assert (zeros == 0).all()


def test_arenas_of_a_model_take_the_formats_of_its_spec() -> None:
    """Rows by default; words where asked for, rows there for a group that words cannot hold."""
    plain = group_spec()
    latent = replace(plain, name="mla", layers=(11,), k_heads=1, v_dim=3)
    spec = KVSpec(groups=(plain, latent), block_size=16, dtype="float32")
    common: dict[str, Any] = {"dtype": torch.float32, "device": CPU}

    rows = ArenaGroups(spec, [3, 3], **common).arenas
    words = ArenaGroups(spec, [3, 3], layout="words", **common).arenas
    quantised = ArenaGroups(with_format(spec, "k8v4"), [3, 3], layout="words", **common).arenas

    assert [type(arena) for arena in rows.values()] == [Arena, Arena]
    assert [type(arena) for arena in words.values()] == [WordArena, Arena]
    assert [type(arena) for arena in quantised.values()] == [WordArena, Arena]
    assert quantised[0].num_bytes == 3 * 16 * (2 * (24 + 4) + 2 * (8 + 4))
    with pytest.raises(
        ConfigError, match=r"layout='rows' cannot hold .* group g; use layout='words'"
    ):
        ArenaGroups(with_format(spec, "int4"), [3, 3], **common)


def test_copies_and_poison_of_groups_work_on_words() -> None:
    """A copied block has the same bytes, a freed one is NaN."""
    spec = with_format(KVSpec(groups=(group_spec(),), block_size=16, dtype="float32"), "int4")
    arenas = ArenaGroups(spec, [3], dtype=torch.float32, device=CPU, poison=True, layout="words")
    arena = arenas.arenas[0]
    arena.fill([BlockId(0)], 2.0)

    arenas.copy_block(0, BlockId(0), BlockId(2))
    arenas.poison(0, [BlockId(0)])

    k_TW, v_TW = arena.read(0, slots_of(torch.arange(48)))
    assert [part.isnan().all().item() for part in (k_TW[:16], v_TW[:16])] == [True, True]
    assert (k_TW[32:] - 2).abs().max() < 0.5


def test_what_moves_rows_can_be_replaced() -> None:
    """The arena hands its bytes, layout and dtype to what was passed in, and asks nothing else."""
    made: list[tuple[Tensor, WordLayout, torch.dtype]] = []

    class Counting(TorchWordRows):
        """Remembers what it was made of."""

        def __init__(self, storage_NB: Tensor, layout: WordLayout, dtype: torch.dtype) -> None:
            super().__init__(storage_NB, layout, dtype)
            made.append((storage_NB, layout, dtype))

    arena = arena_of(group_spec(LayerFormat(KVFormat.FP8, KVFormat.FP8)), rows_of=Counting)

    ((storage_NB, layout, dtype),) = made
    assert storage_NB is arena.storage
    assert layout is arena.layout
    assert dtype is torch.float32
