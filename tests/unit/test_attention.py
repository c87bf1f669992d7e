"""Gathered attention against attention written out in fp64, over random steps on a poisoned arena."""

import random
from dataclasses import dataclass, replace
from math import exp, tanh

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvkeep.arena import Arena, ArenaGroups
from kvkeep.attention import (
    AttentionTerms,
    GatherAttention,
    GroupInputs,
    Item,
    build_group_inputs,
    reference_attention,
)
from kvkeep.spec import BlockId, GroupSpec, KVSpec, LayerKind, Span

CPU = torch.device("cpu")
NUM_LAYERS = 2


@dataclass(frozen=True)
class Row:
    """One request in the test: all its keys and values, and the span that the step computes."""

    k_SKD: Tensor
    v_SKD: Tensor
    span: Span
    blocks: list[BlockId | None]
    read_only: frozenset[int]


@dataclass(frozen=True)
class Step:
    """Random requests whose earlier positions lie in a poisoned arena."""

    spec: GroupSpec
    block_size: int
    arenas: ArenaGroups
    rows: list[Row]
    q_1HTD: Tensor
    layer: int

    @property
    def inputs(self) -> GroupInputs:
        """The tensors of the step."""
        items, at = [], 0
        for row in self.rows:
            items.append(Item(at, row.span, row.blocks, row.read_only))
            at += len(row.span)
        return build_group_inputs(self.spec, self.block_size, items, CPU)

    def new_kv(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the step's own tokens, [1, K, T, D]."""
        spans = [(row, slice(row.span.start, row.span.stop)) for row in self.rows]
        k_TKD = torch.cat([row.k_SKD[span] for row, span in spans])
        v_TKD = torch.cat([row.v_SKD[span] for row, span in spans])
        return k_TKD.transpose(0, 1)[None], v_TKD.transpose(0, 1)[None]

    def expected(self, terms: AttentionTerms) -> Tensor:
        """Attention position by position in fp64, [1, T, H, D of v]."""
        out, at = [], 0
        for row in self.rows:
            for position in range(row.span.start, row.span.stop):
                out.append(brute_force(self.spec, row, position, self.q_1HTD[0, :, at], terms))
                at += 1
        return torch.stack(out)[None]


def brute_force(
    spec: GroupSpec, row: Row, position: int, q_HD: Tensor, terms: AttentionTerms
) -> Tensor:
    """One query over the positions that its layer kind lets it read, in plain Python, [H, D of v]."""
    heads = []
    group_size = q_HD.shape[0] // spec.k_heads
    window = spec.window or 0
    reads = {
        LayerKind.FULL: lambda at: True,
        LayerKind.SLIDING: lambda at: position - at < window,
        LayerKind.CHUNKED: lambda at: at // max(window, 1) == position // max(window, 1),
    }[spec.kind]
    for head, q_D in enumerate(q_HD.double()):
        sink = 0.0 if terms.sinks_H is None else exp(terms.sinks_H[head].item())
        total, sum_D = sink, torch.zeros(spec.v_dim, dtype=torch.float64)
        for at in filter(reads, range(position + 1)):
            score = (q_D @ row.k_SKD[at, head // group_size].double()).item() * terms.scaling
            if terms.softcap is not None:
                score = terms.softcap * tanh(score / terms.softcap)
            total += exp(score)
            sum_D += exp(score) * row.v_SKD[at, head // group_size].double()
        heads.append(sum_D / total)
    return torch.stack(heads)


def random_step(rng: random.Random, spec: GroupSpec, group_size: int) -> Step:
    """Requests of random lengths, single tokens and spans mixed, blocks in random places."""
    block_size = rng.randint(1, 6)
    rows: list[Row] = []
    lengths = [rng.randint(1, 24) for _ in range(rng.randint(1, 6))]
    needed = sum(-(-length // block_size) for length in lengths)
    arenas = ArenaGroups(
        KVSpec(groups=(spec,), block_size=block_size, dtype="float32"),
        [needed + 3],
        dtype=torch.float32,
        device=CPU,
        poison=True,
    )
    places = [BlockId(block) for block in rng.sample(range(needed + 3), needed + 3)]
    arenas.poison(0, places)
    layer = rng.randrange(NUM_LAYERS)
    for length in lengths:
        num_new = 1 if rng.random() < 0.5 else rng.randint(1, length)
        start = rng.randint(0, length - num_new)
        row = Row(
            torch.randn(length, spec.k_heads, spec.k_dim),
            torch.randn(length, spec.v_heads, spec.v_dim),
            Span(start, start + num_new),
            [places.pop() for _ in range(-(-length // block_size))],
            frozenset(),
        )
        row = with_past(row, spec, block_size, arenas, layer, rng)
        rows.append(row)
    num_tokens = sum(len(row.span) for row in rows)
    q_1HTD = torch.randn(1, spec.k_heads * group_size, num_tokens, spec.k_dim)
    return Step(spec, block_size, arenas, rows, q_1HTD, layer)


def with_past(
    row: Row,
    spec: GroupSpec,
    block_size: int,
    arenas: ArenaGroups,
    layer: int,
    rng: random.Random,
) -> Row:
    """The row with its earlier positions written; blocks out of the window are given back."""
    first = spec.first_needed(row.span.start)
    inside = range(-(-row.span.start // block_size), row.span.stop // block_size)
    read_only = frozenset(number for number in inside if rng.random() < 0.3)
    blocks = [None if (at + 1) * block_size <= first else b for at, b in enumerate(row.blocks)]
    for position in range(first, row.span.stop):
        number, offset = divmod(position, block_size)
        if position < row.span.start or number in read_only:
            block = blocks[number]
            assert block is not None
            arena = arenas.arenas[0]
            assert isinstance(arena, Arena)
            block_E, layout = arena.block(block), arena.layout
            k_at = layout.k_offset(layer) + offset * spec.k_width
            v_at = layout.v_offset(layer) + offset * spec.v_width
            block_E[k_at : k_at + spec.k_width] = row.k_SKD[position].flatten()
            block_E[v_at : v_at + spec.v_width] = row.v_SKD[position].flatten()
    return replace(row, blocks=blocks, read_only=read_only)


@st.composite
def specs(draw: st.DrawFn) -> tuple[GroupSpec, int]:
    """A group of any attention kind, and how many query heads share a key/value head."""
    kind = draw(st.sampled_from([LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED]))
    heads = draw(st.integers(1, 3))
    spec = GroupSpec(
        name="group",
        kind=kind,
        layers=tuple(range(NUM_LAYERS)),
        window=None if kind is LayerKind.FULL else draw(st.integers(1, 9)),
        k_heads=heads,
        k_dim=draw(st.sampled_from([2, 4])),
        v_heads=heads,
        v_dim=draw(st.sampled_from([2, 3, 4])),
        itemsize=4,
    )
    return spec, draw(st.integers(1, 4))


@given(specs(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_gathered_attention_is_attention_written_out(
    shape: tuple[GroupSpec, int], seed: int, has_softcap: bool, has_sinks: bool
) -> None:
    """Over mixed items, windows, chunks, head groupings and terms; NaN in every slot not written."""
    torch.manual_seed(seed)
    step = random_step(random.Random(seed), *shape)
    terms = AttentionTerms(
        scaling=0.7,
        softcap=1.5 if has_softcap else None,
        sinks_H=torch.randn(step.q_1HTD.shape[1]) if has_sinks else None,
    )
    backend, inputs = GatherAttention(step.arenas), step.inputs
    backend.write(inputs, 0, step.layer, *step.new_kv())

    out_1THD = backend.attend(inputs, 0, step.layer, step.q_1HTD, step.new_kv(), terms)
    read = backend.read(inputs, 0, step.layer)
    gathered_1THD = backend.attend_gathered(inputs, step.q_1HTD, read, terms)

    expected_1THD = step.expected(terms)
    torch.testing.assert_close(out_1THD.double(), expected_1THD, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gathered_1THD.double(), expected_1THD, atol=2e-5, rtol=1e-5)


@given(specs(), st.integers(0, 2**31))
def test_writing_touches_the_slots_of_the_step_and_no_others(
    shape: tuple[GroupSpec, int], seed: int
) -> None:
    """Read-only blocks, other layers, earlier positions and free blocks stay as they were."""
    torch.manual_seed(seed)
    step = random_step(random.Random(seed), *shape)
    spec, arena, size = step.spec, step.arenas.arenas[0], step.block_size
    assert isinstance(arena, Arena)
    for row in step.rows:
        arena.fill([block for at in row.read_only if (block := row.blocks[at]) is not None], 7.0)
    before = torch.stack([arena.block(BlockId(at)) for at in range(arena.num_blocks)])
    expected = before.clone()
    for row in step.rows:
        for position in range(row.span.start, row.span.stop):
            number, offset = divmod(position, size)
            if number not in row.read_only:
                block = row.blocks[number]
                k_at = arena.layout.k_offset(step.layer) + offset * spec.k_width
                v_at = arena.layout.v_offset(step.layer) + offset * spec.v_width
                expected[block, k_at : k_at + spec.k_width] = row.k_SKD[position].flatten()
                expected[block, v_at : v_at + spec.v_width] = row.v_SKD[position].flatten()

    GatherAttention(step.arenas).write(step.inputs, 0, step.layer, *step.new_kv())

    after = torch.stack([arena.block(BlockId(at)) for at in range(arena.num_blocks)])
    assert torch.equal(after.nan_to_num(nan=99.0), expected.nan_to_num(nan=99.0))


@given(specs(), st.integers(0, 2**31), st.booleans(), st.booleans())
def test_the_reference_is_attention_written_out(
    shape: tuple[GroupSpec, int], seed: int, has_softcap: bool, has_sinks: bool
) -> None:
    """The oracle of the faster paths is itself compared with plain Python."""
    torch.manual_seed(seed)
    (spec, group_size), length = shape, random.Random(seed).randint(1, 12)
    row = Row(
        torch.randn(length, spec.k_heads, spec.k_dim),
        torch.randn(length, spec.v_heads, spec.v_dim),
        Span(0, length),
        [],
        frozenset(),
    )
    q_HQD = torch.randn(spec.k_heads * group_size, length, spec.k_dim)
    terms = AttentionTerms(
        scaling=0.5,
        softcap=2.0 if has_softcap else None,
        sinks_H=torch.randn(q_HQD.shape[0]) if has_sinks else None,
    )
    mask_QS = torch.tensor(
        [[spec.first_needed(q) <= at <= q for at in range(length)] for q in range(length)]
    )

    out_BHQD = reference_attention(
        q_HQD[None],
        row.k_SKD.transpose(0, 1)[None],
        row.v_SKD.transpose(0, 1)[None],
        mask_QS[None],
        terms,
    )

    expected = [brute_force(spec, row, at, q_HQD[:, at], terms) for at in range(length)]
    expected_HQD = torch.stack(expected, dim=1)
    torch.testing.assert_close(out_BHQD[0].double(), expected_HQD, atol=2e-5, rtol=1e-5)


def items_of(lengths: list[int], block_size: int = 4) -> list[Item]:
    """Single tokens behind pasts of these lengths."""
    numbers = iter(range(1000))
    return [
        Item(
            row,
            Span(length - 1, length),
            [BlockId(next(numbers)) for _ in range(-(-length // block_size))],
            frozenset(),
        )
        for row, length in enumerate(lengths)
    ]


def full_group() -> GroupSpec:
    """One layer that reads everything."""
    return GroupSpec(
        name="full",
        kind=LayerKind.FULL,
        layers=(0,),
        k_heads=1,
        k_dim=2,
        v_heads=1,
        v_dim=2,
        itemsize=4,
    )


def test_single_tokens_of_similar_length_are_read_together() -> None:
    """Padding stays under a third of the longest, however lengths are mixed."""
    lengths = [100, 10, 95, 9, 80, 1, 76]

    inputs = build_group_inputs(full_group(), 4, items_of(lengths), CPU)

    sizes = [(batch.num_items, batch.num_positions) for batch in inputs.batches]
    assert sizes == [(4, 100), (2, 10), (1, 1)]


def test_padding_reads_what_was_written_and_is_masked() -> None:
    """A shorter item's padding repeats its own last slot, and no query sees it."""
    inputs = build_group_inputs(full_group(), 4, items_of([8, 7]), CPU)

    (batch,) = inputs.batches
    slots = (batch.slots.blocks_T * 4 + batch.slots.offsets_T).view(2, 8).tolist()
    assert slots == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 14]]
    assert batch.mask_BQS is not None
    assert batch.mask_BQS[:, 0].sum(dim=1).tolist() == [8, 7]


@pytest.mark.parametrize(("start", "is_causal"), [(0, True), (3, False)])
def test_a_span_from_the_beginning_needs_no_mask(start: int, is_causal: bool) -> None:
    """Plain causal attention is left to torch; behind a past a mask says who reads what."""
    item = Item(0, Span(start, 8), [BlockId(0), BlockId(1)], frozenset())

    (batch,) = build_group_inputs(full_group(), 4, [item], CPU).batches

    assert (batch.is_causal, batch.mask_BQS is None) == (is_causal, is_causal)
