"""Blocks that nobody uses, on their way from the device to the tiers below it."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from kvkeep.blocks import stored_key
from kvkeep.cache.copies import Copies
from kvkeep.cache.places import Places
from kvkeep.spec import BlockId, BlockKey
from kvkeep.tiers.base import Occasion

__all__ = ["Resting"]

# Blocks whose fate is decided in one poll, at the most, so that a step is never held up.
_MOST_AT_ONCE = 64
_LONG_AGO = float("-inf")


class Resting:
    """When each block was let go of last; those that rest for `idle_s` leave. None keeps them."""

    def __init__(
        self,
        places: Places,
        copies: Copies,
        idle_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self._places = places
        self._copies = copies
        self._idle_s = idle_s
        self._clock = clock
        # The longest ago first.
        self._rested: OrderedDict[tuple[int, BlockId], tuple[BlockKey, float]] = OrderedDict()

    @property
    def has_overdue(self) -> bool:
        """Whether a block is to leave that was told to."""
        return bool(self._rested) and next(iter(self._rested.values()))[1] == _LONG_AGO

    def note(self, group: int, block: BlockId, key: BlockKey) -> None:
        """A request has let go of a sealed block."""
        if self._idle_s is not None:
            self._rested[group, block] = (key, self._clock())
            self._rested.move_to_end((group, block))

    def demote_soon(self, group: int, block: BlockId) -> None:
        """Treat a sealed block as one that rested long enough, unless a request holds it."""
        ledger = self._places.ledgers[group]
        key = ledger.key_of(block)
        if key is not None and not ledger.pool.num_holders(block):
            self._rested[group, block] = (key, _LONG_AGO)
            self._rested.move_to_end((group, block), last=False)

    def poll(self) -> None:
        """Blocks that rested long enough leave the device, once they are below."""
        before_s = self._clock() - (self._idle_s or 0.0)
        for _ in range(min(len(self._rested), _MOST_AT_ONCE)):
            place, (key, rested_s) = next(iter(self._rested.items()))
            if rested_s > before_s or not self._demote(*place, key):
                return
            del self._rested[place]

    def _demote(self, group: int, block: BlockId, key: BlockKey) -> bool:
        """Whether the block is on its way, or is not to go at all."""
        ledger = self._places.ledgers[group]
        if ledger.key_of(block) != key or ledger.pool.num_holders(block):
            return True
        stored = stored_key(key, group)
        if self._copies.is_under_way(stored):
            return False
        if self._copies.wants(stored, Occasion.IDLE):
            leave = partial(self._leave, group, block, key)
            entry = ledger.entry_of(block)
            return self._copies.begin(group, block, entry, Occasion.IDLE, leave)
        if self._copies.has_copy(stored):
            self._leave(group, block, key)
        return True

    def _leave(self, group: int, block: BlockId, key: BlockKey) -> None:
        """Let go of a block that is below, unless somebody has come to use it."""
        ledger = self._places.ledgers[group]
        if ledger.key_of(block) == key and not ledger.pool.num_holders(block):
            self._copies.leave_alone(group, [ledger.entry_of(block)])
            self._places.forget(group, [block])
