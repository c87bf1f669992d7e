"""First blocks in the model's dtype beside quantised ones: bookkeeping, memory, settings, exact K/V."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkeep.arena import ArenaGroups, Slots, SplitArena, fit_blocks, native_arena
from kvkeep.config import EngineSettings, SamplingParams
from kvkeep.engine.outputs import FinishReason
from kvkeep.errors import CapacityError, ConfigError, KernelError
from kvkeep.hf.format_probe import measure_basis, probe_format
from kvkeep.hf.geometry import measure_geometry
from kvkeep.hf.load import BUNDLED, load_model
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.trial_logits import Served
from kvkeep.llm import LLM
from kvkeep.native import Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import BlockId, GroupSpec, KVSpec, LayerKind, with_format
from kvkeep.testing.tiny_models import build_tiny
from tests.content_store import CheckedCache, full, quantised, sliding, spec_of

CPU = torch.device("cpu")
SIZE = 8
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def checked_cache(num_rest: int, num_first: int) -> CheckedCache:
    """A cache of one quantised group with blocks of four tokens."""
    return CheckedCache(spec_of(quantised()), [num_rest, num_first])


def group_spec(kind: LayerKind = LayerKind.FULL, window: int | None = None) -> GroupSpec:
    """Two layers as a model computes them in float32."""
    return GroupSpec(
        name=kind.value, kind=kind, layers=(0, 1), window=window,
        k_heads=2, k_dim=16, v_heads=2, v_dim=8, itemsize=4,
    )  # fmt: skip


def kv_spec(*groups: GroupSpec, kv_format: str = "int4") -> KVSpec:
    """A model of these groups in a format, its first blocks exact."""
    plain = KVSpec(groups=groups, block_size=SIZE, dtype="float32", exact_first_block=True)
    return with_format(plain, kv_format)


def split_arena(num_rest: int = 3, num_first: int = 2, **options: Any) -> SplitArena:
    """Int4 blocks beside float32 ones, poisoned."""
    spec, counts = kv_spec(group_spec()), [num_rest, num_first]
    common: dict[str, Any] = {"dtype": torch.float32, "device": CPU, "layout": "words"}
    arena = ArenaGroups(spec, counts, **(common | options)).arenas[0]
    assert isinstance(arena, SplitArena)
    arena.fill([BlockId(at) for at in range(arena.num_blocks)], float("nan"))
    return arena


def kernels() -> Kernels:
    """The compiled kernels, or the test is skipped."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no kernels: {found.reason}")
    return found


# --- what belongs to whom ------------------------------------------------------------------------


def test_blocks_are_counted_by_class() -> None:
    """A request needs one first block; bytes are those of each class."""
    checked = checked_cache(8, 3)
    lease = checked.begin([1] * 9)
    assert checked.finish(lease)

    cache, stats = checked.cache, checked.cache.stats()
    assert cache.num_blocks() == [8, 3]
    assert cache.num_available() == [6, 2]
    assert cache.blocks_needed(9, 16) == [2, 1]
    assert cache.blocks_needed(3, 16) == [0, 1]
    assert [group.name for group in stats.groups] == ["quantised", "quantised first"]
    rest_bytes, first_bytes = (group.block_bytes for group in stats.groups)
    assert rest_bytes == 4 * 2 * (1 + 4)
    assert first_bytes == 4 * 2 * 4
    assert stats.in_use_bytes == 2 * rest_bytes + first_bytes
    assert stats.capacity_bytes == 8 * rest_bytes + 3 * first_bytes


def test_what_is_dropped_is_counted_in_its_own_bytes() -> None:
    """A first block and two others."""
    checked = checked_cache(8, 3)
    checked.warm([1] * 12)

    receipt = checked.cache.clear()

    assert receipt.num_blocks == 3
    assert receipt.num_bytes == checked.cache.stats().capacity_bytes - 6 * 40 - 2 * 32


def test_first_blocks_run_out_by_themselves() -> None:
    """With all first blocks held another request can be reserved, but not extended, whatever else is free."""
    checked = checked_cache(32, 2)
    leases = [checked.begin([token] * 6) for token in range(3)]

    assert checked.step(leases[0])
    assert checked.step(leases[1])
    assert not checked.step(leases[2])
    leases[0].release()
    assert checked.step(leases[2])
    for lease in leases[1:]:
        lease.release()
    checked.assert_idle()


def test_with_one_first_block_requests_take_turns() -> None:
    """Each evicts the other's first block and nothing more; what is known behind it stays known."""
    checked = checked_cache(16, 1)
    checked.warm([1] * 12)
    checked.warm([2] * 12)

    assert checked.gaps_of([1] * 12) == [(0, 4), (11, 12)]
    lease = checked.begin([1] * 12)
    assert checked.finish(lease)
    lease.release()
    assert checked.gaps_of([1] * 12) == [(11, 12)]
    assert checked.gaps_of([2] * 12) == [(0, 4), (11, 12)]
    checked.assert_idle()


def test_a_partial_hit_in_the_first_block_needs_two_of_them() -> None:
    """With one only, the request begins all the same: alone, without sharing."""
    for num_first, num_reused in ((2, 3), (1, 0)):
        checked = checked_cache(8, num_first)
        checked.warm([1, 2, 3, 4, 5])

        lease = checked.begin([1, 2, 3, 9, 9])

        assert lease.reused_tokens == num_reused
        assert checked.finish(lease)
        lease.release()
        checked.assert_idle()


def test_forks_copy_a_first_block_into_another_one() -> None:
    """Both write on into the block that they share; the second one to do so gets its own."""
    checked = checked_cache(8, 2)
    lease = checked.begin([1, 2])
    assert checked.finish(lease)
    child = checked.cache.fork(lease)
    assert child is not None
    for one, token in ((child, 3), (lease, 4)):
        one.append([token])
        assert checked.finish(one)

    own, other = (one.tables[0].place(0) for one in (lease, child))
    assert own != other
    assert min(own, other) >= 8
    for one in (lease, child):
        checked.check_lease(one)
        one.release()
    checked.assert_idle()


def test_a_block_in_the_wrong_arena_is_a_problem() -> None:
    """verify() sees a table whose first block is like all others."""
    checked = checked_cache(8, 2)
    lease = checked.begin([1] * 6)
    assert checked.finish(lease)
    assert checked.cache.verify().ok

    lease.tables[0].blocks.reverse()

    assert any("lies in another arena" in one for one in checked.cache.verify().problems)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity_blocks", [30, 200, 5_000, 100_000])
def test_memory_is_divided_among_classes(capacity_blocks: int) -> None:
    """Nothing is exceeded, little is left, and first blocks take at most a quarter."""
    spec = kv_spec(group_spec(), group_spec(LayerKind.SLIDING, 16))
    own_bytes, window_bytes, first_bytes = (one.block_bytes(SIZE) for one in spec.block_classes)
    capacity = capacity_blocks * own_bytes

    num_rest, num_windowed, num_first = fit_blocks(
        spec, capacity, max_requests=4, max_batch_tokens=SIZE
    )

    used = num_rest * own_bytes + num_windowed * window_bytes + num_first * first_bytes
    assert capacity - 2 * (own_bytes + window_bytes) < used <= capacity
    assert num_first == 1 or num_first * first_bytes <= used / 4
    if capacity_blocks >= 5_000:
        share = (used - num_windowed * window_bytes) / own_bytes / 32
        assert abs(num_first - max(8, share)) <= 1


def test_memory_for_no_first_block_is_refused() -> None:
    """A block of every class is the least, and a first one takes nearly five times what another does."""
    spec = kv_spec(group_spec())
    with pytest.raises(CapacityError, match="less than one block of 8 tokens in every group"):
        fit_blocks(spec, 4 * spec.block_bytes(), max_requests=1, max_batch_tokens=SIZE)


def test_allocated_bytes_are_those_of_the_classes() -> None:
    """Of the blocks of each arena, and of each block."""
    spec = kv_spec(group_spec())
    rest_bytes, first_bytes = (one.block_bytes(SIZE) for one in spec.block_classes)
    arena = split_arena(5, 3)

    assert rest_bytes == SIZE * 2 * 2 * (16 // 2 + 4 + 8 // 2 + 4)
    assert first_bytes == SIZE * 2 * 2 * (16 + 8) * 4
    assert arena.num_bytes == 5 * rest_bytes + 3 * first_bytes
    assert arena.block(BlockId(4)).nbytes == rest_bytes
    assert arena.block(BlockId(5)).nbytes == first_bytes


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_first_blocks_read_back_to_the_bit(num_tokens: int) -> None:
    """Slots of both kinds in one call: floats come back as they were, others as their codec makes them."""
    torch.manual_seed(num_tokens)
    arena = split_arena()
    numbers_T = torch.randperm(5 * SIZE)[:num_tokens]
    slots = Slots(numbers_T // SIZE, numbers_T % SIZE)
    k_TKD, v_TKD = torch.randn(num_tokens, 2, 16), torch.randn(num_tokens, 2, 8)

    arena.write(1, slots, k_TKD, v_TKD)

    is_first_T = slots.blocks_T >= 3
    for read in (arena.read, arena.borrow):
        for found_TW, x_TKD in zip(read(1, slots), (k_TKD, v_TKD), strict=True):
            x_TW = x_TKD.flatten(1)
            assert torch.equal(found_TW[is_first_T], x_TW[is_first_T])
            error_T = (found_TW - x_TW).abs().amax(dim=1)
            assert (error_T[~is_first_T] > 0).all()
            assert (error_T < 0.5).all()
    assert arena.read(0, slots)[0].isnan().all()


def test_kernels_and_torch_write_the_same_bytes() -> None:
    """Slots are told apart by id in both."""
    found = kernels()
    arena, other = split_arena(), split_arena()
    ref = native_arena(found, other)
    numbers_T = torch.randperm(5 * SIZE)
    slots = found.slots(numbers_T // SIZE, numbers_T % SIZE)
    k_TKD, v_TKD = torch.randn(len(numbers_T), 2, 16), torch.randn(len(numbers_T), 2, 8)

    arena.write(1, Slots(numbers_T // SIZE, numbers_T % SIZE), k_TKD, v_TKD)
    found.check_slots(ref, slots)
    found.write(ref, 1, slots, k_TKD, v_TKD)
    k_back_TKD, v_back_TKD = torch.empty_like(k_TKD), torch.empty_like(v_TKD)
    found.read(ref, 1, slots, k_back_TKD, v_back_TKD)

    assert torch.equal(arena.rest.storage, other.rest.storage)
    assert torch.equal(arena.first.storage, other.first.storage)
    k_TW, v_TW = arena.read(1, Slots(numbers_T // SIZE, numbers_T % SIZE))
    assert torch.equal(k_back_TKD.flatten(1), k_TW)
    assert torch.equal(v_back_TKD.flatten(1), v_TW)


def test_kernels_refuse_what_lies_outside_of_both() -> None:
    """Slots behind the last first block, and arenas of other sizes."""
    found = kernels()
    arena = split_arena()
    ref = native_arena(found, arena)
    last, behind = (found.slots(torch.tensor([block]), torch.tensor([0])) for block in (4, 5))

    found.check_slots(ref, last)
    with pytest.raises(KernelError, match="out_of_bounds"):
        found.check_slots(ref, behind)
    narrow = replace(group_spec(), k_dim=8)
    words = ArenaGroups(
        KVSpec(groups=(narrow,), block_size=SIZE, dtype="float32"), [2],
        dtype=torch.float32, device=CPU, layout="words",
    )  # fmt: skip
    other = native_arena(found, words.arenas[0])  # type: ignore[arg-type]  # a WordArena
    with pytest.raises(KernelError, match="bad_argument"):
        found.check_slots(found.with_first_blocks(ref, other), last)


# --- settings ------------------------------------------------------------------------------------


def test_the_namespace_says_that_first_blocks_are_exact() -> None:
    """Blocks of both kinds of cache never meet; where nothing is quantised there is no difference."""
    spec = kv_spec(group_spec())

    assert spec.kv_format == "int4/1;first=float32"
    assert replace(spec, exact_first_block=False).kv_format == "int4/1"
    one_exact = with_format(replace(spec, exact_first_block=True), "k8v4", exact_layers=[1])
    assert one_exact.kv_format == "k8v4/1;1=float32;first=float32"
    assert kv_spec(group_spec(), kv_format="auto").kv_format == "float32"
    assert kv_spec(group_spec(), kv_format="auto").block_classes == (group_spec(),)


def test_layers_with_windows_have_no_first_blocks_apart() -> None:
    """Beside layers that read everything they stay as they are; alone the setting is refused."""
    both = kv_spec(group_spec(), group_spec(LayerKind.SLIDING, 16))

    assert both.first_block_groups == (0,)
    with pytest.raises(ConfigError, match=r"kv_exact_first_block=True .* all have windows"):
        kv_spec(group_spec(LayerKind.SLIDING, 16))
    assert spec_of(full(), sliding(3)).first_block_groups == ()


def test_a_setting_that_is_no_bool_is_refused() -> None:
    """With the field and the value."""
    with pytest.raises(ConfigError, match="kv_exact_first_block=1 is not a bool"):
        EngineSettings(kv_exact_first_block=1)  # type: ignore[arg-type]  # wrong on purpose


# --- a whole model -------------------------------------------------------------------------------


def first_block(llm: LLM, prompt: list[int]) -> list[Tensor]:
    """The keys and values of a prompt's first block, of all layers, as they are read."""
    cache, installed = llm.engine.cache, llm.installed
    key = llm.engine.chain(prompt).keys[0]
    parts: list[Tensor] = []
    for group, arena in installed.arenas.arenas.items():
        block = cache._ledgers[group].get(key)
        assert block is not None
        slots = Slots(torch.full((SIZE,), block), torch.arange(SIZE))
        for layer in range(len(installed.geometry.spec.groups[group].layers)):
            parts += [part.clone() for part in arena.read(layer, slots)]
    return parts


@pytest.mark.parametrize("by", ["auto", "torch"])
@pytest.mark.parametrize("kv_format", ["int4", "fp8", "k8v4"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "lfm2"])
def test_the_first_block_is_that_of_a_cache_without_format(
    name: str, kv_format: str, by: str
) -> None:
    """To the last bit in every layer: computed, copied from a partial hit, repaired, and after preemption."""
    model = build_tiny(name)
    common: dict[str, Any] = {
        "block_size": SIZE, "capacity": "8MB", "poison": True, "kernels": by,
        "max_batch_tokens": SIZE, "kv_exact_layers": (),
    }  # fmt: skip
    rng = random.Random(0)
    prompt = [rng.randrange(3, 120) for _ in range(3 * SIZE + 3)]
    plain = LLM(model, **common)
    plain.generate([prompt], GREEDY)
    expected = first_block(plain, prompt)

    llm = LLM(model, kv_format=kv_format, kv_exact_first_block=True, **common)
    llm.generate([prompt], GREEDY)
    found = first_block(llm, prompt)
    llm.generate([prompt[:5] + [1] * 20], GREEDY)
    assert llm.cache.drop(prompt, [0]).num_blocks
    llm.generate([prompt], GREEDY)
    repaired = first_block(llm, prompt)

    assert len(expected) == len(found) == len(repaired)
    for own, other, again in zip(expected, found, repaired, strict=True):
        assert torch.equal(own, other)
        assert torch.equal(own, again)
    assert llm.cache.verify().problems == ()


def test_the_probe_looks_behind_the_first_block() -> None:
    """Its sequences are hardly longer than one, which would make every format look right."""
    kernels()
    model = load_model(BUNDLED, dtype=torch.float32).model
    probes = []
    for exact_first_block in (False, True):
        geometry = measure_geometry(model, 32, exact_first_block=exact_first_block)
        served = Served(model, geometry, Mode.NATIVE, kernels())
        probes.append(probe_format(served, "int4", measure_basis(served)))

    plain, with_first = probes
    assert plain.whole_kld / 2 < with_first.whole_kld < plain.whole_kld
    assert with_first.exact_layers == plain.exact_layers
    assert with_first.num_positions < plain.num_positions


def test_many_requests_share_few_first_blocks() -> None:
    """More requests than first blocks all end: some wait, and none reads what nobody wrote."""
    model = build_tiny("llama")
    common: dict[str, Any] = {
        "block_size": SIZE, "poison": True, "kv_format": "int8", "kv_exact_layers": (),
        "kv_exact_first_block": True,
    }  # fmt: skip
    spec = LLM(model, capacity="8MB", **common).installed.geometry.spec
    small = LLM(model, capacity=40 * spec.groups[0].block_bytes(SIZE), max_requests=12, **common)
    assert small.cache.stats().groups[1].num_blocks < 12
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 120) for _ in range(9 + at)] for at in range(12)]

    outputs = small.generate(prompts, GREEDY)

    assert [output.choices[0].finish_reason for output in outputs] == [FinishReason.LENGTH] * 12
    assert sum(output.receipt.num_preemptions for output in outputs) > 0
    assert small.cache.verify().problems == ()
