"""What pools hold, counted."""

from collections.abc import Sequence

from kvkeep.blocks import BlockPool
from kvkeep.cache.receipts import CacheStats, GroupStats
from kvkeep.spec import KVSpec, LayerKind

__all__ = ["blocks_needed", "count_blocks"]


def blocks_needed(spec: KVSpec, num_tokens: int, span_tokens: int) -> list[int]:
    """For each class, the blocks that a request holds at its longest, `span_tokens` a step."""
    size, firsts = spec.block_size, spec.first_block_groups
    needed = [
        1
        if group.kind is LayerKind.RECURRENT
        else min(
            spec.num_blocks(num_tokens),
            spec.num_blocks((group.window or num_tokens) + span_tokens + size),
        )
        for group in spec.groups
    ]
    for group in firsts:
        needed[group] -= 1
    return needed + [1] * len(firsts)


def count_blocks(spec: KVSpec, pools: Sequence[BlockPool], *, num_leases: int) -> CacheStats:
    """Blocks and bytes of every class, `spec.block_classes`; what was reused or computed is not in it."""
    groups = tuple(
        GroupStats(
            name=one.name,
            layers=one.layers,
            num_blocks=pool.num_blocks,
            block_bytes=one.block_bytes(spec.block_size),
            in_use=pool.num_held,
            reusable=pool.num_evictable,
            free=pool.num_free,
            num_evictions=pool.num_evictions,
        )
        for one, pool in zip(spec.block_classes, pools, strict=True)
    )
    return CacheStats(
        capacity_bytes=sum(group.num_blocks * group.block_bytes for group in groups),
        in_use_bytes=sum(group.in_use * group.block_bytes for group in groups),
        reusable_bytes=sum(group.reusable * group.block_bytes for group in groups),
        free_bytes=sum(group.free * group.block_bytes for group in groups),
        open_leases=num_leases,
        reused_tokens=0,
        computed_tokens=0,
        groups=groups,
    )
