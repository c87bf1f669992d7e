"""Where a step's tokens are written and what its queries read, as tensors; one set for each KV group.

Legend: T packed tokens of the step, B items of a batch, Q queries of an item, S positions an item reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvkeep.arena import Slots
from kvkeep.native import ItemsRef, SlotsRef
from kvkeep.spec import BlockId, GroupSpec, LayerKind, Span

__all__ = ["GroupInputs", "Item", "PagedInputs", "ReadBatch", "build_group_inputs"]

# Single-token items are read together while padding stays under a third of the longest.
_MIN_LENGTH_RATIO = 0.75
# And while what they read stays in the processor's caches between the gather and the attention.
_MOST_READ_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Item:
    """One span of one request: rows `row <= r < row + len(span)` of the packed step.

    `blocks` and `read_only` are those of the request's table in the group at hand.
    """

    row: int
    span: Span
    blocks: Sequence[BlockId | None]
    read_only: frozenset[int] | set[int]


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Items computed by one attention call: B items of Q queries, each reading S positions.

    `rows` are the packed rows of the B*Q queries. `mask_BQS` is True where a query reads, None where every
    query reads all (or, with `is_causal`, all up to itself). With `is_whole` the items read nothing but
    the step's own tokens in `rows`; with `is_all` these are all rows of the step. With `is_beginning` the
    item reads the first S positions of what the batch before it read.
    """

    rows: slice | Tensor
    num_items: int
    num_queries: int
    slots: Slots
    mask_BQS: Tensor | None
    is_causal: bool
    is_whole: bool
    is_all: bool = False
    is_beginning: bool = False

    @property
    def num_positions(self) -> int:
        """S, padding included."""
        return self.slots.blocks_T.numel() // self.num_items


@dataclass(frozen=True, slots=True)
class PagedInputs:
    """What the kernels take: slots that are written, and the items that read blocks in place, if any."""

    slots: SlotsRef
    items: ItemsRef | None


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """One KV group's part of a step. `written_rows` is None when all T tokens are written.

    Items are in a batch that torch computes, or in `paged`, which is None where there are no kernels.
    """

    write_slots: Slots
    written_rows: Tensor | None
    batches: tuple[ReadBatch, ...]
    paged: PagedInputs | None = None


def build_group_inputs(
    spec: GroupSpec,
    block_size: int,
    items: Sequence[Item],
    device: torch.device,
    *,
    gathered: Sequence[Item] | None = None,
) -> GroupInputs:
    """Tensors of one group for a step's items, which lie in `rows` one after the other.

    All items are written; those of `gathered` (by default all) are read in batches.
    """
    write_slots, written_rows = _write_slots(items, block_size, device)
    gathered = items if gathered is None else gathered
    single = [item for item in gathered if len(item.span) == 1]
    batches = [
        _read_singles(spec, block_size, part, device) for part in _similar_lengths(spec, single)
    ]
    batches += _read_spans(
        spec, block_size, [item for item in gathered if len(item.span) > 1], device
    )
    if len(batches) == 1 and len(gathered) == len(items):
        batches = [replace(batches[0], is_all=True)]
    return GroupInputs(write_slots, written_rows, tuple(batches))


def _write_slots(
    items: Sequence[Item], block_size: int, device: torch.device
) -> tuple[Slots, Tensor | None]:
    blocks: list[BlockId] = []
    offsets: list[int] = []
    rows: list[int] = []
    for item in items:
        for position in range(item.span.start, item.span.stop):
            number, offset = divmod(position, block_size)
            if number in item.read_only:
                continue
            block = item.blocks[number]
            assert block is not None
            blocks.append(block)
            offsets.append(offset)
            rows.append(item.row + position - item.span.start)
    num_tokens = sum(len(item.span) for item in items)
    slots = Slots(torch.tensor(blocks, dtype=torch.long), torch.tensor(offsets, dtype=torch.long))
    return _to_device(slots, device), (
        None if len(rows) == num_tokens else torch.tensor(rows, dtype=torch.long, device=device)
    )


def _similar_lengths(spec: GroupSpec, items: Sequence[Item]) -> list[list[Item]]:
    """Items sorted into batches whose lengths are close, so that padding stays small."""
    batches: list[list[Item]] = []
    longest = 0
    token_bytes = (spec.k_width + spec.v_width) * spec.itemsize
    for item in sorted(items, key=lambda item: -_num_read(spec, item)):
        length = _num_read(spec, item)
        is_full = batches and (len(batches[-1]) + 1) * longest * token_bytes > _MOST_READ_BYTES
        if not batches or is_full or length < _MIN_LENGTH_RATIO * longest:
            batches.append([])
            longest = length
        batches[-1].append(item)
    return [sorted(batch, key=lambda item: item.row) for batch in batches]


def _num_read(spec: GroupSpec, item: Item) -> int:
    return item.span.stop - spec.first_needed(item.span.start)


def _read_singles(
    spec: GroupSpec, block_size: int, items: Sequence[Item], device: torch.device
) -> ReadBatch:
    firsts = [spec.first_needed(item.span.start) for item in items]
    lengths = [item.span.stop - first for item, first in zip(items, firsts, strict=True)]
    longest = max(lengths)
    slots = _slots_of(items, firsts, lengths, block_size)
    mask = None
    if min(lengths) != longest:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None].to(device)
    first_row = items[0].row
    rows: slice | Tensor = slice(first_row, first_row + len(items))
    if items[-1].row - first_row != len(items) - 1:
        rows = torch.tensor([item.row for item in items], device=device)
    return ReadBatch(
        rows, len(items), 1, _to_device(slots, device), mask, is_causal=False, is_whole=longest == 1
    )


def _read_spans(
    spec: GroupSpec, block_size: int, items: Sequence[Item], device: torch.device
) -> list[ReadBatch]:
    """A batch for each item. Of one request's, the last comes first: the others read parts of the same."""
    batches: list[ReadBatch] = []
    blocks_before: Sequence[BlockId | None] | None = None
    for item in sorted(items, key=lambda item: (id(item.blocks), -item.span.stop)):
        is_beginning = spec.kind is LayerKind.FULL and item.blocks is blocks_before
        batch = _read_span(spec, block_size, item, device)
        batches.append(replace(batch, is_beginning=is_beginning))
        blocks_before = item.blocks
    return batches


def _read_span(spec: GroupSpec, block_size: int, item: Item, device: torch.device) -> ReadBatch:
    span, first = item.span, spec.first_needed(item.span.start)
    slots = _slots_of([item], [first], [span.stop - first], block_size)
    is_causal = first == span.start and spec.first_needed(span.stop - 1) <= first
    return ReadBatch(
        slice(item.row, item.row + len(span)),
        1,
        len(span),
        _to_device(slots, device),
        None if is_causal else _mask_QS(spec, span, first).unsqueeze(0).to(device),
        is_causal=is_causal,
        is_whole=first == span.start,
    )


def _mask_QS(spec: GroupSpec, span: Span, first: int) -> Tensor:
    """True where the query of a row may read the position of a column, counted from `first`."""
    query = torch.arange(span.start, span.stop)[:, None]
    position = torch.arange(first, span.stop)[None, :]
    mask = position <= query
    if spec.kind is LayerKind.SLIDING:
        assert spec.window is not None
        mask &= position > query - spec.window
    elif spec.kind is LayerKind.CHUNKED:
        assert spec.window is not None
        mask &= position >= query - query % spec.window
    return mask


def _slots_of(
    items: Sequence[Item], firsts: Sequence[int], lengths: Sequence[int], block_size: int
) -> Slots:
    """Places of `lengths[i]` positions from `firsts[i]` on, padded with each item's last position.

    Padding repeats a position that was written, so that what nobody wrote is never read.
    """
    first_B1 = torch.tensor(firsts)[:, None]
    length_B1 = torch.tensor(lengths)[:, None]
    within_BS = torch.minimum(torch.arange(max(lengths))[None, :], length_B1 - 1)
    position_BS = first_B1 + within_BS
    blocks = [
        item.blocks[first // block_size : (first + length - 1) // block_size + 1]
        for item, first, length in zip(items, firsts, lengths, strict=True)
    ]
    most = max(len(row) for row in blocks)
    table = torch.tensor([[*row, *[0] * (most - len(row))] for row in blocks])
    number_BS = position_BS // block_size - first_B1 // block_size
    return Slots(table.gather(1, number_BS).flatten(), (position_BS % block_size).flatten())


def _to_device(slots: Slots, device: torch.device) -> Slots:
    if device.type == "cpu":
        return slots
    return Slots(
        slots.blocks_T.to(device, non_blocking=True), slots.offsets_T.to(device, non_blocking=True)
    )
