"""Pinned blocks in the tiers of this machine: held, so that they are not evicted for others."""

from collections.abc import Iterable

from kvkeep.blocks import stored_key
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.stack import TierStack

__all__ = ["TierHolds"]


class TierHolds:
    """Says to tiers which blocks are pinned; what they hold of them ends with the process."""

    def __init__(self, stack: TierStack, num_groups: int) -> None:
        self._tiers = [stack.tiers[at] for at in stack.local]
        self._groups = range(num_groups)

    def hold(self, keys: Iterable[BlockKey]) -> None:
        """Let tiers keep what they have of these."""
        stored = self._stored(keys)
        for tier in self._tiers if stored else ():
            tier.hold(stored)

    def let_go(self, keys: Iterable[BlockKey]) -> None:
        """Let tiers evict these again."""
        stored = self._stored(keys)
        for tier in self._tiers if stored else ():
            tier.let_go(stored)

    def _stored(self, keys: Iterable[BlockKey]) -> list[StoredKey]:
        return [stored_key(key, group) for key in keys for group in self._groups]
