"""The arena against a plain dict: what was written to a slot is what is read from it, and no more."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.arena import Arena, ArenaGroups, BlockLayout, Slots, StateArena, fit_blocks
from kvkeep.errors import CapacityError
from kvkeep.spec import BlockId, GroupSpec, KVSpec, LayerKind

CPU = torch.device("cpu")


def group_spec(
    kind: LayerKind = LayerKind.FULL, num_layers: int = 2, window: int | None = None, **shape: Any
) -> GroupSpec:
    """A group with keys of two heads and narrower values of one, unless `shape` says otherwise."""
    widths = {"k_heads": 2, "k_dim": 6, "v_heads": 1, "v_dim": 4, "itemsize": 4} | shape
    return GroupSpec(
        name=kind.value, kind=kind, layers=tuple(range(num_layers)), window=window, **widths
    )


def state_spec(state_bytes: int = 100) -> GroupSpec:
    """A group of recurrent layers."""
    return GroupSpec(name="state", kind=LayerKind.RECURRENT, layers=(0,), state_bytes=state_bytes)


def kv_spec(*groups: GroupSpec, block_size: int = 4) -> KVSpec:
    """A model of these groups."""
    return KVSpec(groups=groups, block_size=block_size, dtype="float32")


shapes = st.fixed_dictionaries(
    {name: st.integers(1, 4) for name in ("num_layers", "k_heads", "k_dim", "v_heads", "v_dim")}
)


@given(shapes, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.integers(1, 6))
def test_an_arena_reads_back_what_a_dict_would(
    shape: dict[str, Any], block_size: int, num_blocks: int, seed: int, num_writes: int
) -> None:
    """Random writes to random slots of random layers; every slot read is compared."""
    spec = group_spec(**shape)
    arena = Arena(spec, block_size, num_blocks, dtype=torch.float32, device=CPU)
    arena.fill([BlockId(block) for block in range(num_blocks)], -1.0)
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_blocks * block_size
    empty = (torch.full((spec.k_width,), -1.0), torch.full((spec.v_width,), -1.0))
    expected = {(layer, slot): empty for layer in spec.layers for slot in range(num_slots)}
    for _ in range(num_writes):
        layer = int(torch.randint(len(spec.layers), (1,), generator=generator))
        slots_T = torch.randperm(num_slots, generator=generator)[: 1 + num_slots // 2]
        k_TW = torch.randn(len(slots_T), spec.k_width, generator=generator)
        v_TW = torch.randn(len(slots_T), spec.v_width, generator=generator)
        arena.write(layer, Slots(slots_T // block_size, slots_T % block_size), k_TW, v_TW)
        for slot, k_W, v_W in zip(slots_T.tolist(), k_TW, v_TW, strict=True):
            expected[layer, slot] = (k_W, v_W)

    order_T = torch.randperm(num_slots, generator=generator)
    for layer in spec.layers:
        k_TW, v_TW = arena.read(layer, Slots(order_T // block_size, order_T % block_size))
        for slot, k_W, v_W in zip(order_T.tolist(), k_TW, v_TW, strict=True):
            assert torch.equal(k_W, expected[layer, slot][0])
            assert torch.equal(v_W, expected[layer, slot][1])


@given(shapes, st.integers(1, 5))
def test_canonical_order_is_head_token_dim_and_comes_back(
    shape: dict[str, Any], block_size: int
) -> None:
    """What was written lies at [layer][k|v][head][token][dim] in canonical order."""
    spec = group_spec(**shape)
    arena = Arena(spec, block_size, 3, dtype=torch.float32, device=CPU)
    slots = Slots(torch.full((block_size,), 1), torch.arange(block_size))
    parts = []
    for layer in spec.layers:
        k_TKD = torch.randn(block_size, spec.k_heads, spec.k_dim)
        v_TKD = torch.randn(block_size, spec.v_heads, spec.v_dim)
        arena.write(layer, slots, k_TKD.flatten(1), v_TKD.flatten(1))
        for part_TKD in (k_TKD, v_TKD):
            num_heads, dim = part_TKD.shape[1:]
            parts += [
                part_TKD[token, head, at]
                for head in range(num_heads)
                for token in range(block_size)
                for at in range(dim)
            ]
    stored_E = arena.block(BlockId(1))

    canonical_E = arena.layout.to_canonical(stored_E)

    assert torch.equal(canonical_E, torch.stack(parts))
    assert torch.equal(arena.layout.from_canonical(canonical_E), stored_E)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_bytes_are_those_of_the_spec(dtype: torch.dtype) -> None:
    """Nothing beside the blocks is allocated, and a block is as large as the spec says."""
    spec = group_spec(itemsize=dtype.itemsize)
    arena = Arena(spec, 4, 7, dtype=dtype, device=CPU)

    assert arena.num_bytes == 7 * spec.block_bytes(4)
    assert arena.block(BlockId(3)).nbytes == spec.block_bytes(4)
    assert BlockLayout(spec, 4).block_elements * dtype.itemsize == spec.block_bytes(4)


def test_a_copied_block_is_equal_and_independent() -> None:
    """All layers are copied; writing to one later leaves the other, and the neighbours, alone."""
    spec = group_spec()
    arenas = ArenaGroups(kv_spec(spec), [4], dtype=torch.float32, device=CPU)
    arena = arenas.arenas[0]
    for block in range(4):
        arena.fill([BlockId(block)], float(block))

    arenas.copy_block(0, BlockId(1), BlockId(2))
    arena.fill([BlockId(1)], 9.0)

    assert [arena.block(BlockId(block)).unique().tolist() for block in range(4)] == [
        [0.0],
        [9.0],
        [1.0],
        [3.0],
    ]


@pytest.mark.parametrize("is_poisoned", [True, False])
def test_freed_blocks_are_poisoned_where_that_is_asked_for(is_poisoned: bool) -> None:
    """With `poison` freed blocks become NaN and no others; without, freeing costs nothing."""
    arenas = ArenaGroups(
        kv_spec(group_spec()), [3], dtype=torch.float32, device=CPU, poison=is_poisoned
    )
    arenas.arenas[0].fill([BlockId(0), BlockId(1), BlockId(2)], 1.0)

    arenas.poison(0, [BlockId(1)])

    is_nan = [bool(arenas.arenas[0].block(BlockId(at)).isnan().all()) for at in range(3)]
    assert is_nan == [False, is_poisoned, False]


def test_states_are_copied_reset_and_let_go() -> None:
    """A copy holds the same tensors; a reset or freed state is the one before the first token."""
    arenas = ArenaGroups(kv_spec(state_spec()), [3], dtype=torch.float32, device=CPU)
    states: StateArena = arenas.states[0]
    state = {"0.conv0": torch.ones(2)}
    states.save(BlockId(0), state)

    arenas.copy_block(0, BlockId(0), BlockId(1))
    arenas.reset_state(0, BlockId(0))

    assert states.load(BlockId(0)) is None
    assert states.load(BlockId(1)) is state
    arenas.poison(0, [BlockId(1)])
    assert states.load(BlockId(1)) is None


@given(
    st.integers(1, 200), st.integers(1, 20), st.integers(1, 64), st.sampled_from([0, 6, 50, 1000])
)
def test_blocks_of_all_groups_fit_into_the_capacity(
    capacity_blocks: int, max_requests: int, max_batch_tokens: int, window: int
) -> None:
    """The sum never exceeds the capacity, and less than one block of each group is left unused."""
    sliding = replace(group_spec(LayerKind.SLIDING), window=window) if window else group_spec()
    spec = kv_spec(group_spec(), sliding, state_spec(700))
    capacity = capacity_blocks * spec.block_bytes() + 17

    num_blocks = fit_blocks(
        spec, capacity, max_requests=max_requests, max_batch_tokens=max_batch_tokens
    )

    used = sum(
        blocks * group.block_bytes(4) for blocks, group in zip(num_blocks, spec.groups, strict=True)
    )
    assert min(num_blocks) >= 1
    assert capacity - spec.block_bytes() < used <= capacity


def test_a_windowed_group_gets_no_more_than_its_windows_need() -> None:
    """What windows do not need goes to the layers that read everything."""
    spec = kv_spec(group_spec(), group_spec(LayerKind.SLIDING, window=8))

    full, sliding = fit_blocks(spec, 10**6, max_requests=3, max_batch_tokens=16)

    assert sliding == 2 * 3 * (8 // 4 + 2) + 16 // 4
    assert full > 10 * sliding


def test_too_little_memory_is_refused_with_numbers() -> None:
    """The error names what was given and what one block takes."""
    spec = kv_spec(group_spec())

    with pytest.raises(
        CapacityError, match=r"capacity=500 B is less than one block of 4 tokens.*512 B"
    ):
        fit_blocks(spec, 500, max_requests=1, max_batch_tokens=1)
