"""The most hits that any cache of a size can have on a trace, by one that knows the future.

Source: Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2),
1966; with bypass: a block that comes back later than all others is not kept at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kvkeep.spec import BlockKey

__all__ = ["Clairvoyant", "Optimum", "ideal_hits"]


@dataclass(frozen=True, slots=True)
class Optimum:
    """Blocks found by a cache that knows the future.

    `hits` counts every block that it has, `prefix_hits` those with all blocks before them found too.
    """

    hits: int
    prefix_hits: int


class Clairvoyant:
    """A trace with its future: `chains` are the block keys of each request, root first, named by prefix.

    The block to be used farthest in the future goes first, of equals the deepest in its chain. That is the
    optimum with holes allowed, and, because whoever uses a block uses all blocks before it too, it never
    makes a hole: no parent is needed later than its child. So it is the optimum of contiguous prefixes as
    well.
    """

    def __init__(self, chains: Sequence[Sequence[BlockKey]]) -> None:
        self._chains = chains
        # For each block of each request, the number of the next request that has it; len(chains) for none.
        self._next_uses: list[list[int]] = []
        seen: dict[BlockKey, int] = {}
        for number in reversed(range(len(chains))):
            chain = chains[number]
            self._next_uses.append([seen.get(key, len(chains)) for key in chain])
            seen.update(dict.fromkeys(chain, number))
        self._next_uses.reverse()

    def hits(self, num_blocks: int) -> Optimum:
        """What a cache of `num_blocks` blocks finds at best; O(log n) for each block of the trace."""
        cache = _FarthestFirst(num_blocks, never=len(self._chains))
        hits = prefix_hits = 0
        for chain, next_uses in zip(self._chains, self._next_uses, strict=True):
            is_whole = True
            for depth, (key, next_use) in enumerate(zip(chain, next_uses, strict=True)):
                if cache.use(key, next_use, depth):
                    hits += 1
                    prefix_hits += is_whole
                else:
                    is_whole = False
        return Optimum(hits, prefix_hits)


class _FarthestFirst:
    """A cache whose victim is used farthest in the future; what is never used again is not in it."""

    def __init__(self, num_blocks: int, *, never: int) -> None:
        self._num_blocks = num_blocks
        self._never = never
        self._key_to_next_use: dict[BlockKey, int] = {}
        # Negated, the farthest first; entries whose block has gone or was used since are stale.
        self._heap: list[tuple[int, int, BlockKey]] = []

    def use(self, key: BlockKey, next_use: int, depth: int) -> bool:
        """Whether the block is there; afterwards it is, if it is worth its place."""
        next_uses = self._key_to_next_use
        was_there = next_uses.pop(key, None) is not None
        if next_use == self._never:
            return was_there
        if len(next_uses) >= self._num_blocks:
            farthest = self._farthest()
            if farthest is None or (-next_use, -depth) <= farthest[:2]:
                return was_there
            del next_uses[heappop(self._heap)[2]]
        next_uses[key] = next_use
        heappush(self._heap, (-next_use, -depth, key))
        return was_there

    def _farthest(self) -> tuple[int, int, BlockKey] | None:
        heap = self._heap
        while heap and self._key_to_next_use.get(heap[0][2]) != -heap[0][0]:
            heappop(heap)
        return heap[0] if heap else None


def ideal_hits(chains: Sequence[Sequence[BlockKey]]) -> int:
    """Blocks that a cache without bound finds: all that were there before."""
    seen: set[BlockKey] = set()
    num_blocks = 0
    for chain in chains:
        num_blocks += len(chain)
        seen.update(chain)
    return num_blocks - len(seen)
