"""Pinned blocks on the device: held, so that nothing evicts them, but never so many that requests starve."""

from collections.abc import Iterable, Sequence

from kvkeep.blocks import BlockLedger
from kvkeep.cache.lease import Lease
from kvkeep.cache.places import Places
from kvkeep.spec import BlockId, BlockKey, LayerKind, Span

__all__ = ["PinHolds"]


class PinHolds:
    """Holders of pinned blocks; of the blocks of every group at most `share` are held."""

    def __init__(self, places: Places, share: float) -> None:
        self._places = places
        self._most = [int(share * ledger.pool.num_blocks) for ledger in places.ledgers]
        self._held: list[dict[BlockKey, BlockId]] = [{} for _ in places.ledgers]
        # Asked for with every block that may go, and changed seldom.
        self._holders: frozenset[tuple[int, BlockId]] | None = None

    def __bool__(self) -> bool:
        return any(self._held)

    @property
    def most_blocks(self) -> int:
        """How many blocks may be pinned: what the smallest group that keeps all positions can hold."""
        whole = [
            most
            for most, ledger in zip(self._most, self._ledgers, strict=True)
            if ledger.spec.window is None and ledger.spec.kind is not LayerKind.RECURRENT
        ]
        return min(whole or self._most)

    @property
    def num_held(self) -> int:
        """Blocks of all groups that are held."""
        return sum(map(len, self._held))

    def is_held(self, key: BlockKey) -> bool:
        """Whether the block is held in some group."""
        return any(key in held for held in self._held)

    def num_in(self, group: int) -> int:
        """Blocks of a group that are held."""
        return len(self._held[group])

    def places(self) -> list[tuple[int, BlockId]]:
        """Group and place of all that is held."""
        return [(at, block) for at, held in enumerate(self._held) for block in held.values()]

    def holders(self) -> frozenset[tuple[int, BlockId]]:
        """The same as a set."""
        if self._holders is None:
            self._holders = frozenset(self.places())
        return self._holders

    def hold(self, keys: Iterable[BlockKey]) -> None:
        """Hold what of these is on the device, as far as there is a share left."""
        self._holders = None
        for key in keys:
            for ledger, held, most in zip(self._ledgers, self._held, self._most, strict=True):
                block = ledger.get(key)
                if block is not None and key not in held and len(held) < most:
                    ledger.pool.acquire([block])
                    held[key] = block

    def let_go(self, keys: Iterable[BlockKey]) -> None:
        """Hold these no more."""
        self._holders = None
        for key in keys:
            for at, held in enumerate(self._held):
                block = held.pop(key, None)
                if block is not None:
                    self._places.release(at, [block])

    def make_room(self, lease: Lease, spans: Sequence[Span]) -> list[BlockKey]:
        """Hold as many blocks no more as a lease alone lacks for `spans`, those pinned last before others.

        Returns them, for `hold` once the lease has its places: another may have gone instead.
        """
        self._holders = None
        let_go: list[BlockKey] = []
        for at, (ledger, held) in enumerate(zip(self._ledgers, self._held, strict=True)):
            numbers = self._places.missing_blocks(lease, at, spans)
            for key, block in reversed(list(held.items())):
                if ledger.pool.has_room(len(numbers), with_first=0 in numbers):
                    break
                # What the lease uses itself frees no place.
                if ledger.pool.num_holders(block) == 1:
                    del held[key]
                    self._places.release(at, [block])
                    let_go.append(key)
        return let_go[::-1]

    @property
    def _ledgers(self) -> "tuple[BlockLedger, ...]":
        return tuple(self._places.ledgers)
