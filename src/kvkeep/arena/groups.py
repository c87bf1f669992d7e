"""The arenas of all KV groups of a model, sized from one number of bytes."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from kvkeep.arena.arena import Arena
from kvkeep.arena.base import GroupArena
from kvkeep.arena.split_arena import SplitArena
from kvkeep.arena.states import StateArena
from kvkeep.arena.words import WordArena, WordRowsOf
from kvkeep.config.sizes import format_bytes
from kvkeep.errors import CapacityError, ConfigError
from kvkeep.spec import BlockId, GroupSpec, KVSpec, LayerKind, words_can_hold

__all__ = ["ArenaGroups", "fit_blocks"]

# The share of memory that recurrent states may take: running ones first, the rest for resuming.
_STATE_SHARE = 0.25
# First blocks that lie apart: one in so many, which suits prompts of a thousand tokens on average, ...
_BLOCKS_OF_REQUEST = 32
# ... but two for each running request, its own and one to copy from or to be found again, ...
_FIRST_BLOCKS_OF_REQUEST = 2
# ... and no more of a group's memory than this.
_FIRST_SHARE = 0.25


def fit_blocks(
    spec: KVSpec, capacity_bytes: int, *, max_requests: int, max_batch_tokens: int
) -> list[int]:
    """How many blocks there are of each class, `spec.block_classes`, in `capacity_bytes`.

    A windowed group needs no more than the windows of all running requests, twice over so that finished
    ones stay reusable; recurrent states take at most a quarter; full attention gets all the rest. First
    blocks that lie apart get at most a quarter of their group's. Raises CapacityError with the numbers when
    not even one block of each class fits.
    """
    size = spec.block_size
    bounds = [
        _bounded_need(group, size, max_requests, max_batch_tokens, capacity_bytes)
        for group in spec.groups
    ]
    remaining = capacity_bytes
    num_blocks = [0] * len(spec.groups)
    # Those with a bounded need first, each capped so that equal shares in blocks stay possible.
    order = sorted(range(len(bounds)), key=lambda at: bounds[at] or capacity_bytes)
    while order:
        rest_bytes = sum(spec.groups[at].block_bytes(size) for at in order)
        share = remaining // rest_bytes
        at = order.pop(0)
        bound = bounds[at]
        num_blocks[at] = share if bound is None else min(share, bound)
        remaining -= num_blocks[at] * spec.groups[at].block_bytes(size)
    for at in spec.first_block_groups:
        num_first = _num_first_blocks(spec.groups[at], size, num_blocks[at], max_requests)
        first_bytes = num_first * spec.groups[at].of_first_blocks().block_bytes(size)
        num_blocks[at] -= -(-first_bytes // spec.groups[at].block_bytes(size))
        num_blocks.append(num_first)
    if min(num_blocks) < 1:
        least = sum(one.block_bytes(size) for one in spec.block_classes)
        raise CapacityError(
            f"capacity={format_bytes(capacity_bytes)} is less than one block of {size} tokens in every "
            f"group ({format_bytes(least)}); give more memory or a smaller block_size"
        )
    return num_blocks


def _bounded_need(
    group: GroupSpec, size: int, max_requests: int, max_batch_tokens: int, capacity_bytes: int
) -> int | None:
    if group.kind is LayerKind.RECURRENT:
        return max(1, int(_STATE_SHARE * capacity_bytes) // group.block_bytes(size))
    if group.window is None:
        return None
    return 2 * max_requests * (group.window // size + 2) + max_batch_tokens // size


def _num_first_blocks(group: GroupSpec, size: int, num_blocks: int, max_requests: int) -> int:
    """Of the memory of so many of the group's other blocks."""
    wanted = max(_FIRST_BLOCKS_OF_REQUEST * max_requests, num_blocks // _BLOCKS_OF_REQUEST)
    num_bytes = int(_FIRST_SHARE * num_blocks * group.block_bytes(size))
    return max(1, min(wanted, num_bytes // group.of_first_blocks().block_bytes(size)))


class ArenaGroups:
    """One arena per group; the BlockStore of a KVCache, with as many blocks of each of `spec.block_classes`.

    With `poison` every block that is freed or handed out is filled with NaN, so that reading what nobody
    wrote shows up in the output: for tests.

    `layout` "rows" keeps K/V as the model computes them; "words" is what native kernels read, and what
    every other format needs. `rows_of` makes what moves rows into words, plain torch by default. A group
    that words cannot hold has no formats and is kept in rows. Raises ConfigError for formats in rows.
    """

    def __init__(
        self,
        spec: KVSpec,
        class_num_blocks: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        poison: bool = False,
        layout: Literal["rows", "words"] = "rows",
        rows_of: WordRowsOf | None = None,
    ) -> None:
        self._poison = poison
        self.device = device
        self.arenas: dict[int, GroupArena] = {}
        self.states: dict[int, StateArena] = {}
        words_of = partial(
            WordArena, block_size=spec.block_size, dtype=dtype, device=device, rows_of=rows_of
        )
        firsts = class_num_blocks[len(spec.groups) :]
        group_to_num_first = dict(zip(spec.first_block_groups, firsts, strict=True))
        for at, (group, num_blocks) in enumerate(zip(spec.groups, class_num_blocks, strict=False)):
            if group.kind is LayerKind.RECURRENT:
                self.states[at] = StateArena(num_blocks)
            elif layout == "words" and words_can_hold(group, spec.block_size):
                arena = words_of(group, num_blocks=num_blocks)
                self.arenas[at] = arena
                if at in group_to_num_first:
                    first = words_of(group.of_first_blocks(), num_blocks=group_to_num_first[at])
                    self.arenas[at] = SplitArena(arena, first)
            elif not group.formats:
                self.arenas[at] = Arena(
                    group, spec.block_size, num_blocks, dtype=dtype, device=device
                )
            else:
                raise ConfigError(
                    f"layout={layout!r} cannot hold the formats of the KV group {group.name}; "
                    "use layout='words', or kv_format='auto'"
                )

    def copy_block(self, group: int, source: BlockId, target: BlockId) -> None:
        """Copy the whole content of `source` to `target`."""
        if group in self.states:
            self.states[group].copy(source, target)
        else:
            arena = self.arenas[group]
            arena.block(target).copy_(arena.block(source))

    def reset_state(self, group: int, block: BlockId) -> None:
        """Make a recurrent state the one before the first token."""
        self.states[group].reset([block])

    def poison(self, group: int, blocks: Sequence[BlockId]) -> None:
        """Release what freed states hold; fill blocks with NaN where that was asked for."""
        if group in self.states:
            self.states[group].reset(blocks)
        elif self._poison:
            self.arenas[group].fill(blocks, float("nan"))
