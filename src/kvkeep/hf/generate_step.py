"""Where the columns of a batch lie in the arenas, as tensors: one set for each KV group of one forward.

Legend: B rows of the batch, R rows held, T columns of the forward, S columns up to its end, N blocks
of a row, K key/value heads, D head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkeep.arena import GroupArena, Slots
from kvkeep.hf.generate_rows import Row, Started
from kvkeep.hf.geometry import LayerPlace
from kvkeep.spec import BlockId

__all__ = ["Columns", "DenseStep"]


class Columns:
    """The block number and the offset of every position, made once and grown by doubling."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.device = device
        self._grow(1024)

    def numbers_S(self, stop: int) -> Tensor:
        """Block numbers of positions below `stop`."""
        self._grow(stop)
        return self._numbers[:stop]

    def offsets_S(self, stop: int) -> Tensor:
        """Offsets within their blocks of positions below `stop`."""
        self._grow(stop)
        return self._offsets[:stop]

    def _grow(self, stop: int) -> None:
        size = getattr(self, "_size", 0)
        if stop > size:
            self._size = max(stop, 2 * size)
            positions = torch.arange(self._size, device=self.device)
            self._numbers = positions // self.block_size
            self._offsets = positions % self.block_size


class _GroupSlots:
    """One group's part: [B, S] are read, and rows of [B, T] are written, all of them when `rows` is None."""

    def __init__(self, arena: GroupArena, reads: Slots, writes: Slots, rows: Tensor | None) -> None:
        self.arena = arena
        self.reads = reads
        self.writes = writes
        self.written_rows = rows


class DenseStep:
    """Writes the new K/V of each layer and returns those of all columns.

    Padding columns read the arena's last block, which holds zeros and belongs to nobody.
    """

    def __init__(
        self, arenas: dict[int, GroupArena], columns: Columns, rows: Sequence[Row], started: Started
    ) -> None:
        self._rows = rows
        self._columns = columns
        self._started = started
        self._pads_R1 = None
        if any(row.pad for row in rows):
            self._pads_R1 = torch.tensor([row.pad for row in rows], device=columns.device)[:, None]
        self._groups = {at: self._slots(at, arena) for at, arena in arenas.items()}

    def update(self, place: LayerPlace, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; returns all of them, [B, K, S, D]."""
        group = self._groups[place.group]
        k_TW, v_TW = _by_token(k_BKTD), _by_token(v_BKTD)
        if group.written_rows is not None:
            k_TW, v_TW = k_TW[group.written_rows], v_TW[group.written_rows]
        group.arena.write(place.layer, group.writes, k_TW, v_TW)
        if self._started.start == 0 and group.arena.is_exact(place.layer):
            return k_BKTD, v_BKTD
        # Also what was just written, rounded as later forwards will see it.
        return self.read(place, k_BKTD.shape[0])

    def read(self, place: LayerPlace, num_rows: int) -> tuple[Tensor, Tensor]:
        """One layer's keys and values of all columns, [B, K, S, D]."""
        group = self._groups[place.group]
        k_SW, v_SW = group.arena.read(place.layer, group.reads)
        spec = group.arena.layout.spec
        return (
            _by_head(k_SW, num_rows, spec.k_heads, spec.k_dim),
            _by_head(v_SW, num_rows, spec.v_heads, spec.v_dim),
        )

    def _slots(self, group: int, arena: GroupArena) -> _GroupSlots:
        started = self._started
        start, stop, num_rows = started.start, started.stop, len(started.leaders)
        blocks_RS, offsets_RS = self._places(group, arena, stop)
        written = self._written_rows(group, stop)
        first_rows = [started.leaders.index(at) for at in range(len(self._rows))]
        # Contiguous, as kernels want it: one column of many rows would stay a view.
        new_blocks_T, new_offsets_T = (
            part[:, start:].contiguous().view(-1) for part in (blocks_RS, offsets_RS)
        )
        if written is not None:
            new_blocks_T, new_offsets_T = new_blocks_T[written], new_offsets_T[written]
        if len(first_rows) != num_rows or written is not None:
            written = self._batch_rows(first_rows, written)
        if len(first_rows) != num_rows:
            leaders_B = torch.tensor(started.leaders, device=blocks_RS.device)
            blocks_RS, offsets_RS = blocks_RS[leaders_B], offsets_RS[leaders_B]
        reads = Slots(blocks_RS.reshape(-1), offsets_RS.reshape(-1))
        return _GroupSlots(arena, reads, Slots(new_blocks_T, new_offsets_T), written)

    def _places(self, group: int, arena: GroupArena, stop: int) -> tuple[Tensor, Tensor]:
        """Block and offset of every column of every row held, each [R, S]."""
        nobody = BlockId(arena.num_blocks - 1)
        tables = [
            [nobody, *([] if row.lease is None else row.lease.tables[group].blocks)]
            for row in self._rows
        ]
        most = max(len(table) for table in tables)
        device = self._columns.device
        table_RN = torch.tensor(
            [[*table, *[nobody] * (most - len(table))] for table in tables], device=device
        )
        if self._pads_R1 is None:
            numbers_S, offsets_S = self._columns.numbers_S(stop), self._columns.offsets_S(stop)
            return table_RN[:, 1:].index_select(1, numbers_S), offsets_S.expand(len(tables), stop)
        positions_RS = torch.arange(stop, device=device) - self._pads_R1
        size = self._columns.block_size
        numbers_RS = torch.div(positions_RS, size, rounding_mode="floor").clamp(min=-1) + 1
        return table_RN.gather(1, numbers_RS), positions_RS % size

    def _written_rows(self, group: int, stop: int) -> Tensor | None:
        """Which of the new columns [R * T] are written: not padding, not blocks shared for reading."""
        read_only = [
            set() if row.lease is None else row.lease.tables[group].read_only for row in self._rows
        ]
        if self._pads_R1 is None and not any(read_only):
            return None
        start = self._started.start
        columns_T = torch.arange(start, stop, device=self._columns.device)
        positions_RT = columns_T - (0 if self._pads_R1 is None else self._pads_R1)
        positions_RT = positions_RT.expand(len(self._rows), -1)
        is_written_RT = positions_RT >= 0
        for at, numbers in enumerate(read_only):
            for number in numbers:
                is_inside = positions_RT[at] // self._columns.block_size == number
                is_written_RT[at] &= ~is_inside
        return None if is_written_RT.all() else is_written_RT.reshape(-1).nonzero().squeeze(1)

    def _batch_rows(self, first_rows: Sequence[int], written: Tensor | None) -> Tensor:
        """Rows of [B * T] that hold the new columns `written` of [R * T]."""
        num_columns = self._started.stop - self._started.start
        device = self._columns.device
        first_R1 = torch.tensor(first_rows, device=device)[:, None] * num_columns
        rows = (first_R1 + torch.arange(num_columns, device=device)).reshape(-1)
        return rows if written is None else rows[written]


def _by_token(part_BKTD: Tensor) -> Tensor:
    return part_BKTD.transpose(1, 2).reshape(-1, part_BKTD.shape[1] * part_BKTD.shape[3])


def _by_head(part_SW: Tensor, num_rows: int, heads: int, dim: int) -> Tensor:
    return part_SW.view(num_rows, -1, heads, dim).transpose(1, 2)
