"""Random steps over a poisoned arena of words, and attention in fp64 over what is stored there.

Legend: T packed tokens, H query heads, K key/value heads, G query heads of one of these, Q queries of an
item, S positions it reads, D head size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvkeep.arena import ArenaGroups, Slots, SplitArena, WordArena, native_arena
from kvkeep.attention import AttentionTerms, Item, NativeAttention
from kvkeep.native import MOST_QUERIES, ArenaRef, ItemsRef, Kernels
from kvkeep.spec import BlockId, GroupSpec, KVFormat, KVSpec, LayerFormat, LayerKind, Span

CPU = torch.device("cpu")
LAYER = 1
# The positions at which the kernels cut a context.
CHUNK = 256


@dataclass(frozen=True)
class Length:
    """An item: `num_queries` queries, the first at `start` behind the shared prefix, if it shares."""

    is_sharing: bool
    start: int
    num_queries: int


@dataclass(frozen=True)
class Case:
    """A step. `prefix` blocks are shared by some items; `has_nan` says what lies where nobody wrote.

    With `is_first_apart` first blocks are float32, where the group reads all positions.
    """

    spec: GroupSpec
    block_size: int
    group_size: int
    dtype: torch.dtype
    prefix: int
    lengths: tuple[Length, ...]
    has_nan: bool
    has_softcap: bool
    has_sinks: bool
    sharpness: float
    seed: int
    is_first_apart: bool = False

    def terms(self) -> AttentionTerms:
        """The terms of the layer."""
        return AttentionTerms(
            scaling=self.sharpness * self.spec.k_dim**-0.5,
            softcap=3.0 if self.has_softcap else None,
            sinks_H=torch.randn(self.spec.k_heads * self.group_size) if self.has_sinks else None,
        )


class Step:
    """A case with its arena, written by plain torch; everything but what items read is poisoned."""

    function = "attend"  # the kernel, with the dims of its queries and of its results

    @staticmethod
    def dims(spec: GroupSpec) -> tuple[int, int]:
        """Of a query, and of a result."""
        return spec.k_dim, spec.v_dim

    def stored(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Keys and values [S, K, D] in fp64 as attention reads them."""
        spec = self.case.spec
        k_SW, v_SW = self.arena.read(LAYER, slots)
        k_SKD = k_SW.double().view(-1, spec.k_heads, spec.k_dim)
        return k_SKD, v_SW.double().view(-1, spec.v_heads, spec.v_dim)

    def __init__(self, case: Case, kernels: Kernels) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        self._rng = random.Random(case.seed)
        spec, size = case.spec, case.block_size
        spans = [_span_of(case, length) for length in case.lengths]
        num_blocks = case.prefix + 3 + sum(-(-span.stop // size) for span in spans)
        kv_spec = KVSpec(
            groups=(spec,), block_size=size, dtype="float32", exact_first_block=case.is_first_apart
        )
        arenas = ArenaGroups(
            kv_spec,
            [num_blocks] + [len(spans) + 2] * len(kv_spec.first_block_groups),
            dtype=torch.float32,
            device=CPU,
            layout="words",
        )
        arena = arenas.arenas[0]
        assert isinstance(arena, WordArena | SplitArena)
        self.arena = arena
        self._poison()
        self._free = [BlockId(at) for at in self._rng.sample(range(num_blocks), num_blocks)]
        first_ids = range(num_blocks, arena.num_blocks)
        self._free_first = [BlockId(at) for at in self._rng.sample(first_ids, len(first_ids))]
        prefix = [self._take(number) for number in range(case.prefix)]
        self._write(prefix, 0, case.prefix * size)
        self.items: list[Item] = []
        for length, span in zip(case.lengths, spans, strict=True):
            row = sum(len(item.span) for item in self.items)
            table = self._table(span, prefix if length.is_sharing else [])
            self.items.append(Item(row, span, table, frozenset()))
        num_tokens = sum(len(span) for span in spans)
        num_heads = spec.k_heads * case.group_size
        q_dim = self.dims(spec)[0]
        self.q_1HTD = torch.randn(1, num_heads, num_tokens, q_dim).to(case.dtype)
        self.terms = case.terms()
        self.backend = NativeAttention(arenas, kernels)
        self.ref: ArenaRef = native_arena(kernels, arena)

    def attend(self) -> Tensor:
        """What the backend computes, [T, H, D of v]."""
        inputs, spec = self.backend.inputs(0, self.items), self.case.spec
        k_TW, v_TW = self.arena.read(LAYER, inputs.write_slots)
        k_1KTD = k_TW.view(-1, spec.k_heads, spec.k_dim).transpose(0, 1)[None]
        v_1KTD = v_TW.view(-1, spec.v_heads, spec.v_dim).transpose(0, 1)[None]
        new_kv = (k_1KTD, v_1KTD)
        return self.backend.attend(inputs, 0, LAYER, self.q_1HTD, new_kv, self.terms)[0]

    def attend_directly(
        self, kernels: Kernels, items: list[Item], num_threads: int = 1, **terms: Tensor | None
    ) -> Tensor:
        """What the kernels compute for some of the items, in their rows of [T, H, D]; else zero."""
        q_THD = self.q_1HTD[0].transpose(0, 1)
        out_THD = q_THD.new_zeros(*q_THD.shape[:2], self.dims(self.case.spec)[1])
        alone = [replace(item, row=0) for item in items] if len(items) == 1 else items
        paged = self.backend.inputs(0, alone).paged
        assert paged is not None
        assert isinstance(paged.items, ItemsRef)
        sinks_H = self.terms.sinks_H
        ref = kernels.terms(
            self.terms.scaling, softcap=self.terms.softcap, **{"sinks_H": sinks_H, **terms}
        )
        rows = slice(items[0].row, items[-1].row + len(items[-1].span))
        kernels.num_threads = num_threads
        attend = getattr(kernels, self.function)
        attend(self.ref, LAYER, paged.items, ref, q_THD[rows], out_THD[rows])
        return out_THD

    def error(self, found_THD: Tensor, alibi_slopes_H: Tensor | None = None) -> float:
        """By how much the worst query is off from attention in fp64; see the tolerances."""
        errors = []
        for item in self.items:
            found_QHD = found_THD[item.row : item.row + len(item.span)]
            weights_HQS, v_SKD = self._weights(item, alibi_slopes_H)
            expected_QHD = _weighted(weights_HQS, v_SKD)
            orthogonal_QHD = _weighted(weights_HQS.square(), v_SKD.square()).sqrt()
            sizes = [one.flatten(1).norm(dim=1) for one in (expected_QHD, orthogonal_QHD)]
            half_unit_QHD = torch.finfo(found_QHD.dtype).eps / 2 * expected_QHD.abs()
            wrong_QHD = (found_QHD.double() - expected_QHD).abs() - half_unit_QHD
            wrong_Q = wrong_QHD.clamp(min=0).flatten(1).norm(dim=1)
            errors.append(wrong_Q / torch.maximum(*sizes))
        return float(torch.cat(errors).max())

    def _weights(self, item: Item, alibi_slopes_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """The softmax of an item's scores in fp64, [H, Q, S], and the values [S, K, D] that it weighs."""
        spec, span = self.case.spec, item.span
        position_S = torch.arange(spec.first_needed(span.start), span.stop)
        slots = _slots(item.blocks, position_S, self.case.block_size)
        k_SKD, v_SKD = self.stored(slots)
        q_HQD = self.q_1HTD[0, :, item.row : item.row + len(span)].double()
        q_KGQD = q_HQD.unflatten(0, (spec.k_heads, -1))
        scores_HQS = torch.einsum("kgqd,skd->kgqs", q_KGQD, k_SKD).flatten(0, 1)
        scores_HQS *= self.terms.scaling
        softcap, sinks_H = self.terms.softcap, self.terms.sinks_H
        if softcap is not None:
            scores_HQS = softcap * (scores_HQS / softcap).tanh()
        if alibi_slopes_H is not None:
            scores_HQS += alibi_slopes_H.double()[:, None, None] * position_S
        for at, query in enumerate(range(span.start, span.stop)):
            is_read_S = (position_S >= spec.first_needed(query)) & (position_S <= query)
            scores_HQS[:, at, ~is_read_S] = -torch.inf
        if sinks_H is not None:
            sinks_HQ1 = sinks_H.double()[:, None, None].expand(-1, len(span), 1)
            scores_HQS = torch.cat((scores_HQS, sinks_HQ1), dim=2)
        return scores_HQS.softmax(dim=2)[..., : len(position_S)], v_SKD

    def _poison(self) -> None:
        if self.case.has_nan:
            self.arena.fill([BlockId(at) for at in range(self.arena.num_blocks)], float("nan"))
            return
        arena = self.arena
        parts = (arena.rest, arena.first) if isinstance(arena, SplitArena) else (arena,)
        for part in parts:  # numbers of every size, infinite ones and NaN among them
            part.storage.random_(256)

    def _take(self, number: int) -> BlockId:
        """A block for a place in a table."""
        is_first = number == 0 and isinstance(self.arena, SplitArena)
        return (self._free_first if is_first else self._free).pop()

    def _table(self, span: Span, prefix: list[BlockId]) -> list[BlockId | None]:
        """The blocks of an item; what lies before its window is given back, and the rest written."""
        size, first = self.case.block_size, self.case.spec.first_needed(span.start)
        own = [self._take(number) for number in range(len(prefix), -(-span.stop // size))]
        blocks = [None if (at + 1) * size <= first else b for at, b in enumerate([*prefix, *own])]
        self._write(blocks, max(first, len(prefix) * size), span.stop)
        return blocks

    def _write(self, blocks: Sequence[BlockId | None], start: int, stop: int) -> None:
        """Random keys and values for positions of a table, in every layer."""
        spec, num_tokens = self.case.spec, max(0, stop - start)
        slots = _slots(blocks, torch.arange(start, start + num_tokens), self.case.block_size)
        for layer in range(len(spec.layers)):
            k_TKD = torch.randn(num_tokens, spec.k_heads, spec.k_dim)
            v_TKD = torch.randn(num_tokens, spec.v_heads, spec.v_dim)
            self.arena.write(layer, slots, k_TKD, v_TKD)


def _span_of(case: Case, length: Length) -> Span:
    start = length.start + (case.prefix * case.block_size if length.is_sharing else 0)
    return Span(start, start + length.num_queries)


def _weighted(weights_HQS: Tensor, v_SKD: Tensor) -> Tensor:
    weights_KGQS = weights_HQS.unflatten(0, (v_SKD.shape[1], -1))
    return torch.einsum("kgqs,skd->qkgd", weights_KGQS, v_SKD).flatten(1, 2)


def _slots(blocks: Sequence[BlockId | None], position_S: Tensor, block_size: int) -> Slots:
    numbers = (position_S // block_size).tolist()
    places = torch.tensor([blocks[number] for number in numbers], dtype=torch.long)
    return Slots(places, position_S % block_size)


@st.composite
def lengths(draw: st.DrawFn, most_queries: int) -> Length:
    """Few positions, many, or about as many as fill a number of chunks."""
    near_chunk = st.builds(
        lambda chunks, by: max(0, CHUNK * chunks + by), st.integers(0, 2), st.integers(-17, 3)
    )
    return Length(
        is_sharing=draw(st.booleans()),
        start=draw(st.one_of(st.integers(0, 40), near_chunk, st.integers(0, 700))),
        num_queries=draw(st.one_of(st.just(1), st.integers(1, most_queries))),
    )


@st.composite
def cases(
    draw: st.DrawFn, pair: LayerFormat | None = None, most_queries: int = MOST_QUERIES
) -> Case:
    """A step of any kind over K/V of one format, or of any two."""
    kind = draw(st.sampled_from([LayerKind.FULL, LayerKind.SLIDING, LayerKind.CHUNKED]))
    heads, block_size = draw(st.integers(1, 3)), draw(st.sampled_from(range(8, 65, 8)))
    dims = st.sampled_from(range(8, 257, 8))
    formats = st.builds(LayerFormat, st.sampled_from(KVFormat), st.sampled_from(KVFormat))
    spec = GroupSpec(
        name="group",
        kind=kind,
        layers=(0, 1),
        window=None
        if kind is LayerKind.FULL
        else draw(st.one_of(st.integers(1, 40), st.integers(1, 600))),
        k_heads=heads,
        k_dim=draw(dims),
        v_heads=heads,
        v_dim=draw(dims),
        itemsize=4,
        formats=(draw(formats), pair or draw(formats)),
    )
    return Case(
        spec=spec,
        block_size=block_size,
        group_size=draw(st.integers(1, 16)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        prefix=draw(st.sampled_from([0, 40, CHUNK, 2 * CHUNK + 50])) // block_size,
        lengths=tuple(draw(st.lists(lengths(most_queries), min_size=1, max_size=5))),
        has_nan=draw(st.booleans()),
        has_softcap=draw(st.booleans()),
        has_sinks=draw(st.booleans()),
        sharpness=draw(st.sampled_from([1.0, 0.2, 3.0, -1.0])),
        seed=draw(st.integers(0, 2**31)),
        is_first_apart=draw(st.booleans()),
    )
