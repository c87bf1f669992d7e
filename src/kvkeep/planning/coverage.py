"""What is known of a request and what must be computed, closed over what each group needs.

A gap widens until everything its queries read is known or computed with it: all earlier positions
for full attention, the window before it for sliding attention, a saved state at its start for
recurrent layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.spec import BlockId, GroupSpec, LayerKind, Span, merge_spans

__all__ = [
    "DEVICE",
    "Coverage",
    "CoveragePlan",
    "GroupBlocks",
    "Known",
    "PartialHit",
    "Run",
    "StoredBlock",
    "coverage_of",
    "plan_coverage",
]


# The source of what is in the arena; tiers have names of their own.
DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Run:
    """Positions `start <= p < stop`; `source` is "device", a tier's name, or None for a gap."""

    start: int
    stop: int
    source: str | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """What the cache knows of a token sequence, as runs that follow one another without overlap."""

    num_tokens: int
    runs: tuple[Run, ...]

    @property
    def known_tokens(self) -> int:
        """Tokens that need no computing."""
        return sum(run.stop - run.start for run in self.runs if run.source is not None)

    @property
    def gaps(self) -> tuple[Span, ...]:
        """The runs that must be computed."""
        return tuple(Span(run.start, run.stop) for run in self.runs if run.source is None)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block that is not on the device, but in the tier of that number and name."""

    at: int
    source: str


# A block on the device, in a tier, or not known.
Known = BlockId | StoredBlock | None


@dataclass(frozen=True, slots=True)
class GroupBlocks:
    """What one group has of a request's full blocks.

    In a recurrent group entry `j` is the state *after* block `j`.
    """

    spec: GroupSpec
    blocks: Sequence[Known]


@dataclass(frozen=True, slots=True)
class PartialHit:
    """The first `num_tokens` tokens of block number `block` are the beginning of a known block."""

    block: int
    num_tokens: int
    group_blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class CoveragePlan:
    """What to compute and what to share.

    `gaps` are in order, the last one ends with the request. `shared` has for each group the numbers
    of the known blocks that some gap reads. With `is_complete` nothing is missing: the last token
    is computed for its logits alone.
    """

    gaps: tuple[Span, ...]
    shared: tuple[tuple[int, ...], ...]
    partial: PartialHit | None
    is_complete: bool

    def shared_inside_gaps(self, group: int, block_size: int) -> set[int]:
        """Numbers of the shared blocks of a group that lie in some gap: read there, not written."""
        return self._inside_gaps(block_size).intersection(self.shared[group])

    def loads(self, group: int, blocks: Sequence[Known], block_size: int) -> list[int]:
        """Numbers of the blocks of a group that some tier has and that the plan wants on the device.

        What lies in some gap as a whole is computed with it and needs no loading.
        """
        stored = [at for at in self.shared[group] if isinstance(blocks[at], StoredBlock)]
        if not stored:
            return []
        whole = [range(-(-gap.start // block_size), gap.stop // block_size) for gap in self.gaps]
        return [at for at in stored if not any(at in numbers for numbers in whole)]

    def _inside_gaps(self, block_size: int) -> set[int]:
        inside: set[int] = set()
        for gap in self.gaps:
            inside.update(range(gap.start // block_size, -(-gap.stop // block_size)))
        return inside


def coverage_of(
    num_tokens: int, block_size: int, plan: CoveragePlan, groups: Sequence[GroupBlocks]
) -> Coverage:
    """The plan's gaps, and between them runs by where their blocks are: the farthest of any group."""
    number_to_source = {
        number: block.source
        for group, shared in zip(groups, plan.shared, strict=True)
        for number in shared
        if isinstance(block := group.blocks[number], StoredBlock)
    }
    runs: list[Run] = []
    at = 0
    for gap in () if plan.is_complete else plan.gaps:
        runs += _known_runs(at, gap.start, block_size, number_to_source)
        runs.append(Run(gap.start, gap.stop, None))
        at = gap.stop
    runs += _known_runs(at, num_tokens, block_size, number_to_source)
    return Coverage(num_tokens, tuple(runs))


def _known_runs(
    start: int, stop: int, block_size: int, number_to_source: dict[int, str]
) -> list[Run]:
    if not number_to_source:
        return [Run(start, stop, DEVICE)] if start < stop else []
    runs: list[Run] = []
    while start < stop:
        number = start // block_size
        end = min(stop, (number + 1) * block_size)
        source = number_to_source.get(number, DEVICE)
        if runs and runs[-1].source == source:
            runs[-1] = Run(runs[-1].start, end, source)
        else:
            runs.append(Run(start, end, source))
        start = end
    return runs


def plan_coverage(
    num_tokens: int, block_size: int, groups: Sequence[GroupBlocks], partial: PartialHit | None
) -> CoveragePlan:
    """Close the gaps of a request of `num_tokens >= 1` tokens over what each group needs.

    The last token is always computed, since its logits are asked for. Pure: changes nothing.
    """
    num_full = num_tokens // block_size
    full = [group for group in groups if group.spec.kind is LayerKind.FULL]
    compute = [False] * num_full
    for group in full:
        if None in group.blocks:
            compute = [
                missing or block is None
                for missing, block in zip(compute, group.blocks, strict=True)
            ]
    # What is missing at the end is always computed: a window of two or more reads the block before.
    windowed = [group for group in groups if group.spec.kind is LayerKind.SLIDING]
    sliding = [group for group in windowed if (group.spec.window or 0) > 1]
    num_known = num_full
    while num_known and (
        compute[num_known - 1] or any(group.blocks[num_known - 1] is None for group in sliding)
    ):
        num_known -= 1
        compute[num_known] = True
    if partial is not None and partial.block != num_known:
        partial = None
    known_stop = num_known * block_size + (partial.num_tokens if partial else 0)
    tail_start = min(known_stop, num_tokens - 1)
    bounded = [group for group in groups if group.spec.kind is not LayerKind.FULL]
    if bounded:
        tail_start = _widen(tail_start, block_size, compute, bounded)
    gaps = _merge_gaps(num_tokens, block_size, compute, tail_start)
    return CoveragePlan(
        gaps=gaps,
        shared=tuple(_shared(group, gaps, block_size) for group in groups),
        partial=partial if partial and tail_start >= num_known * block_size else None,
        is_complete=gaps == (Span(num_tokens - 1, num_tokens),) and known_stop == num_tokens,
    )


def _widen(
    tail_start: int, block_size: int, compute: list[bool], groups: Sequence[GroupBlocks]
) -> int:
    """Mark in `compute` what windows and states ask for, from the end backwards; new tail start."""
    recurrent = [group for group in groups if group.spec.kind is LayerKind.RECURRENT]
    windowed = [group for group in groups if group.spec.kind is not LayerKind.RECURRENT]
    if recurrent:
        tail_start -= tail_start % block_size
    need_from = [group.spec.first_needed(tail_start) for group in windowed]
    gap_start = tail_start
    for at in reversed(range(min(len(compute), tail_start // block_size + 1))):
        block_start, block_stop = at * block_size, (at + 1) * block_size
        if compute[at] and block_start < tail_start < block_stop:
            continue  # its beginning is copied from a partial hit
        if not compute[at] and block_start < tail_start:
            compute[at] = any(
                group.blocks[at] is None and block_stop > first
                for group, first in zip(windowed, need_from, strict=True)
            ) or (gap_start == block_stop and any(group.blocks[at] is None for group in recurrent))
        if compute[at]:
            gap_start = block_start
            need_from = [
                min(first, group.spec.first_needed(block_start))
                for group, first in zip(windowed, need_from, strict=True)
            ]
            if block_stop >= tail_start:
                tail_start = block_start
    return tail_start


def _merge_gaps(
    num_tokens: int, block_size: int, compute: list[bool], tail_start: int
) -> tuple[Span, ...]:
    """Runs of blocks to compute before `tail_start`, and the last gap."""
    gaps: list[Span] = []
    # The beginning of the block in which the tail starts, if any, is known or a copy.
    at, num_blocks = 0, tail_start // block_size
    while at < num_blocks and True in compute[at:num_blocks]:
        start = compute.index(True, at)
        at = compute.index(False, start) if False in compute[start:num_blocks] else num_blocks
        gaps.append(Span(start * block_size, at * block_size))
    return merge_spans([*gaps, Span(tail_start, num_tokens)])


def _shared(group: GroupBlocks, gaps: Sequence[Span], block_size: int) -> tuple[int, ...]:
    """Numbers of the known blocks that some gap reads (for a state: those some gap starts from)."""
    spec, blocks = group.spec, group.blocks
    if spec.kind is LayerKind.FULL:
        return tuple(at for at, block in enumerate(blocks) if block is not None)
    needed: set[int] = set()
    for gap in gaps:
        if spec.kind is LayerKind.RECURRENT:
            needed.update([gap.start // block_size - 1] if gap.start else [])
        else:
            stop = min(len(blocks), -(-gap.stop // block_size))
            needed.update(range(spec.first_needed(gap.start) // block_size, stop))
    return tuple(at for at in sorted(needed) if blocks[at] is not None)
