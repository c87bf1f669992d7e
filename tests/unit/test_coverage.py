"""What must be computed, against an oracle that knows nothing of blocks, sweeps or runs."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import example, given

from kvkeep.planning import (
    CoveragePlan,
    GroupBlocks,
    PartialHit,
    Run,
    StoredBlock,
    coverage_of,
    plan_coverage,
)
from kvkeep.spec import BlockId, GroupSpec, LayerKind, Span
from tests.content_store import chunked, full, positions, recurrent, sliding


@dataclasses.dataclass(frozen=True)
class Case:
    """One question to the planner."""

    num_tokens: int
    block_size: int
    groups: tuple[GroupBlocks, ...]
    partial: PartialHit | None

    def plan(self) -> CoveragePlan:
        """The planner's answer."""
        return plan_coverage(self.num_tokens, self.block_size, self.groups, self.partial)

    def is_known(self, group: GroupBlocks, position: int) -> bool:
        """Whether a full block of the group holds the position."""
        number = position // self.block_size
        return number < len(group.blocks) and group.blocks[number] is not None


def to_compute(case: Case, partial: PartialHit | None) -> set[int]:
    """The least set of positions whose computing leaves nothing to be wished for."""
    size, copied = case.block_size, set[int]()
    if partial is not None:
        start = partial.block * size
        copied = set(range(start, start + partial.num_tokens))
    last = case.num_tokens - 1
    wanted = {last} | set(range(case.num_tokens // size * size, case.num_tokens)) - copied
    for group in case.groups:
        if group.spec.kind is LayerKind.FULL:
            missing = {p for p in range(case.num_tokens) if not case.is_known(group, p)}
            wanted |= missing - copied
    computed: set[int] = set()
    while wanted - computed:
        computed |= wanted
        for group in case.groups:
            if group.spec.kind is LayerKind.RECURRENT:
                wanted |= _state_wishes(case, group, computed)
            else:
                wanted |= _token_wishes(case, group, computed, copied)
    return computed


def _token_wishes(case: Case, group: GroupBlocks, computed: set[int], copied: set[int]) -> set[int]:
    """What the queries read, and what must be written for a new block to be whole."""
    size = case.block_size
    read = {q for p in computed for q in range(group.spec.first_needed(p), p + 1)}
    read |= {q for p in computed for q in range(p - p % size, p + 1)}
    unknown = {p for p in read if not case.is_known(group, p)} - copied
    # A block is computed as a whole or not at all, but for a beginning that is copied.
    blocks = {p // size for p in unknown}
    whole = {p for block in blocks for p in range(block * size, (block + 1) * size)}
    return {p for p in whole if p < case.num_tokens} - copied


def _state_wishes(case: Case, group: GroupBlocks, computed: set[int]) -> set[int]:
    """Where a run of positions starts, the state before it must have been kept."""
    size, wishes = case.block_size, set[int]()
    for start in computed:
        if start > 0 and start - 1 not in computed:
            is_kept = start % size == 0 and group.blocks[start // size - 1] is not None
            if not is_kept:
                wishes.add(start - 1)
    return wishes


def check(case: Case) -> CoveragePlan:
    """The plan computes what the oracle asks for, and shares what its queries read."""
    plan = case.plan()
    computed = set(positions(plan.gaps))
    assert computed == to_compute(case, plan.partial)
    assert case.num_tokens - 1 in computed
    assert all(len(gap) > 0 for gap in plan.gaps)
    assert all(left.stop < right.start for left, right in pairwise(plan.gaps))
    assert plan.gaps[-1].stop == case.num_tokens
    for group, shared in zip(case.groups, plan.shared, strict=True):
        check_shared(case, group, shared, plan)
    for run in coverage_of(case.num_tokens, case.block_size, plan, case.groups).runs:
        assert (run.source is None) == (run.start in computed and not plan.is_complete)
    return plan


def check_shared(case: Case, group: GroupBlocks, shared: Sequence[int], plan: CoveragePlan) -> None:
    """All that a query reads is computed, shared, or in the copy; only known blocks are shared."""
    size, computed = case.block_size, set(positions(plan.gaps))
    assert list(shared) == sorted(set(shared))
    assert all(group.blocks[number] is not None for number in shared)
    if group.spec.kind is LayerKind.RECURRENT:
        starts = [gap.start for gap in plan.gaps if gap.start > 0]
        assert [start // size - 1 for start in starts] == list(shared)
        assert all(start % size == 0 for start in starts)
        return
    copied: range = range(0)
    if plan.partial is not None:
        start = plan.partial.block * size
        copied = range(start, start + plan.partial.num_tokens)
    for query in computed:
        for position in range(group.spec.first_needed(query), query + 1):
            assert position in computed or position in copied or position // size in shared
            # What is known is not written again, so it must be there to be read.
            assert position // size in shared or not case.is_known(group, position)


group_specs = st.one_of(
    st.just(full()),
    st.builds(sliding, st.integers(1, 20)),
    st.builds(chunked, st.integers(1, 20)),
    st.just(recurrent()),
)


@st.composite
def cases(draw: st.DrawFn, specs: st.SearchStrategy[GroupSpec] = group_specs) -> Case:
    """A random request, and what each group knows of it."""
    block_size = draw(st.integers(1, 8))
    num_tokens = draw(st.integers(1, 50))
    num_full = num_tokens // block_size
    groups = tuple(
        GroupBlocks(
            spec,
            draw(
                st.lists(
                    st.sampled_from([None, BlockId(7), BlockId(8)]),
                    min_size=num_full,
                    max_size=num_full,
                )
            ),
        )
        for spec in draw(st.lists(specs, min_size=1, max_size=4))
    )
    # As the cache does: behind the last block that all groups know, never with a state.
    number = num_full
    while number and any(group.blocks[number - 1] is None for group in groups):
        number -= 1
    left = min(block_size - 1, num_tokens - number * block_size)
    is_recurrent = any(group.spec.kind is LayerKind.RECURRENT for group in groups)
    length = 0 if is_recurrent or left < 1 else draw(st.integers(0, left))
    places = tuple(BlockId(9) for _ in groups)
    return Case(
        num_tokens, block_size, groups, PartialHit(number, length, places) if length else None
    )


def known(spec: GroupSpec, pattern: str) -> GroupBlocks:
    """What a group knows, a letter for each full block: "x" known, "." not."""
    return GroupBlocks(spec, [BlockId(at) if c == "x" else None for at, c in enumerate(pattern)])


@given(cases())
@example(Case(8, 4, (known(full(), "x."), known(sliding(3), "xx")), PartialHit(1, 2, ())))
@example(Case(8, 4, (known(sliding(3), "x."),), PartialHit(1, 3, ())))
@example(Case(9, 4, (known(chunked(6), "xx"),), PartialHit(2, 1, ())))
def test_a_plan_computes_what_is_needed_and_no_more(case: Case) -> None:
    """For any mix of groups and any holes, the gaps are the oracle's, and all reads are served."""
    plan = check(case)

    assert plan.partial in (None, case.partial)


@given(cases(st.just(full())))
def test_full_attention_computes_exactly_what_is_missing(case: Case) -> None:
    """Missing blocks, the tail behind the last known token, and the last token: nothing else."""
    size = case.block_size
    num_full = case.num_tokens // size
    missing = {n for n in range(num_full) if any(g.blocks[n] is None for g in case.groups)}
    expected = set(range(num_full * size, case.num_tokens))
    for number in missing:
        expected |= set(range(number * size, (number + 1) * size))
    plan = case.plan()
    if plan.partial is not None:
        start = plan.partial.block * size
        expected -= set(range(start, start + plan.partial.num_tokens))

    assert set(positions(plan.gaps)) == expected | {case.num_tokens - 1}


@given(cases(st.one_of(st.just(full()), st.builds(sliding, st.integers(2, 20)))))
def test_a_partial_hit_behind_all_known_blocks_is_used(case: Case) -> None:
    """Where nothing is known from the partial hit on, its tokens are not computed."""
    if case.partial is None:
        return
    rest = [block for g in case.groups for block in g.blocks[case.partial.block :]]
    if all(block is None for block in rest):
        plan = case.plan()

        assert plan.partial == case.partial
        start = case.partial.block * case.block_size
        copied = range(start, min(start + case.partial.num_tokens, case.num_tokens - 1))
        assert not set(copied) & set(positions(plan.gaps))


@pytest.mark.parametrize(
    ("num_tokens", "groups", "partial", "gaps", "is_complete"),
    [
        (10, (known(full(), ".."),), None, [(0, 10)], False),
        (10, (known(full(), "xx"),), None, [(8, 10)], False),
        (9, (known(full(), "xx"),), None, [(8, 9)], False),
        (8, (known(full(), "xx"),), None, [(7, 8)], True),
        (1, (known(full(), ""),), None, [(0, 1)], False),
        (18, (known(full(), "x.x."),), None, [(4, 8), (12, 18)], False),
        (18, (known(full(), "x..x"),), None, [(4, 12), (16, 18)], False),
        (10, (known(full(), "xx"),), PartialHit(2, 1, (BlockId(9),)), [(9, 10)], False),
        (10, (known(full(), "xx"),), PartialHit(2, 2, (BlockId(9),)), [(9, 10)], True),
        (12, (known(full(), "x.."),), PartialHit(1, 3, (BlockId(9),)), [(7, 12)], False),
        (12, (known(full(), "x.x"),), PartialHit(1, 3, (BlockId(9),)), [(4, 8), (11, 12)], False),
        (18, (known(sliding(4), "..xx"),), None, [(16, 18)], False),
        (18, (known(sliding(5), "...x"),), None, [(16, 18)], False),
        (18, (known(sliding(6), "...x"),), None, [(0, 12), (16, 18)], False),
        (18, (known(full(), "xxxx"), known(sliding(4), "xx..")), None, [(8, 18)], False),
        (18, (known(full(), "xxxx"), known(sliding(4), "x..x")), None, [(16, 18)], False),
        (16, (known(full(), "xxxx"), known(sliding(4), "..xx")), None, [(15, 16)], True),
        (18, (known(chunked(8), "...."),), None, [(16, 18)], False),
        (18, (known(chunked(12), "...x"),), None, [(16, 18)], False),
        (18, (known(chunked(12), "xxx."),), None, [(12, 18)], False),
        (16, (known(full(), "xxxx"), known(recurrent(), "..x.")), None, [(12, 16)], False),
        (18, (known(full(), "xxxx"), known(recurrent(), ".x..")), None, [(8, 18)], False),
        (18, (known(full(), "x.xx"), known(recurrent(), "x..x")), None, [(4, 8), (16, 18)], False),
        (18, (known(full(), "xx.x"), known(recurrent(), "x..x")), None, [(4, 12), (16, 18)], False),
    ],
)  # fmt: skip
def test_plans_by_hand(
    num_tokens: int,
    groups: tuple[GroupBlocks, ...],
    partial: PartialHit | None,
    gaps: list[tuple[int, int]],
    is_complete: bool,
) -> None:
    """Plans small enough to be read, for blocks of four tokens."""
    plan = check(Case(num_tokens, 4, groups, partial))

    assert [(gap.start, gap.stop) for gap in plan.gaps] == gaps
    assert plan.is_complete is is_complete


def test_a_window_shares_what_it_reads_only() -> None:
    """Blocks that no gap reads are not held, though they are known."""
    groups = (known(full(), "x.xxxx"), known(sliding(5), "x.xxxx"))

    plan = check(Case(25, 4, groups, None))

    assert plan.gaps == (Span(4, 8), Span(24, 25))
    assert plan.shared == ((0, 2, 3, 4, 5), (0, 5))


def test_blocks_shared_inside_a_gap_are_read_only() -> None:
    """What one group knows and another does not is computed again and not written again."""
    groups = (known(full("a"), "x.xx"), known(full("b"), "xxx."))

    plan = check(Case(17, 4, groups, None))

    assert plan.gaps == (Span(4, 8), Span(12, 17))
    assert [plan.shared_inside_gaps(group, 4) for group in (0, 1)] == [{3}, {1}]


def test_a_partial_hit_of_another_block_is_not_used() -> None:
    """A copy in front of known blocks would leave the end of its block unwritten."""
    plan = Case(13, 4, (known(full(), "x.x"),), PartialHit(1, 3, (BlockId(9),))).plan()

    assert plan.partial is None
    assert plan.gaps == (Span(4, 8), Span(12, 13))


def test_coverage_names_runs_in_order() -> None:
    """Runs follow one another from the first token to the last."""
    case = Case(18, 4, (known(full(), "x.x."),), None)

    coverage = coverage_of(18, 4, case.plan(), case.groups)

    assert coverage.runs == (
        Run(0, 4, "device"), Run(4, 8, None), Run(8, 12, "device"), Run(12, 18, None),
    )  # fmt: skip
    assert coverage.known_tokens == 8
    assert coverage.gaps == (Span(4, 8), Span(12, 18))


def test_coverage_names_the_farthest_place_of_any_group() -> None:
    """A block counts as where the group lies that has to come from the farthest."""
    near, disk = BlockId(0), StoredBlock(1, "disk")
    groups = (
        GroupBlocks(full(), [near, near, disk, disk, None]),
        GroupBlocks(full(), [near, disk, near, disk, None]),
    )
    plan = plan_coverage(22, 4, groups, None)

    coverage = coverage_of(22, 4, plan, groups)

    assert coverage.runs == (Run(0, 4, "device"), Run(4, 16, "disk"), Run(16, 22, None))
    assert [plan.loads(at, group.blocks, 4) for at, group in enumerate(groups)] == [[2, 3], [1, 3]]


def test_what_lies_in_a_gap_is_not_loaded() -> None:
    """One group misses a block: it is computed, although the other group could load it."""
    disk = StoredBlock(0, "disk")
    groups = (GroupBlocks(full(), [disk, disk]), GroupBlocks(full(), [disk, None]))
    plan = plan_coverage(9, 4, groups, None)

    assert [plan.loads(at, group.blocks, 4) for at, group in enumerate(groups)] == [[0], [0]]


def test_complete_coverage_has_no_gap() -> None:
    """When only the last token's logits are missing, everything is known."""
    case = Case(8, 4, (known(full(), "xx"),), None)

    coverage = coverage_of(8, 4, case.plan(), case.groups)

    assert coverage.runs == (Run(0, 8, "device"),)
    assert coverage.known_tokens == 8
