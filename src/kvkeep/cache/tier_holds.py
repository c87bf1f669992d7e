"""Pinned blocks in the tiers of this machine: held, so that they are not evicted for others."""

from collections.abc import Callable, Collection, Iterable

from kvkeep.blocks import stored_key
from kvkeep.errors import PinCapacityError
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Presence
from kvkeep.tiers.stack import TierStack

__all__ = ["TierHolds"]


class TierHolds:
    """Says to tiers which blocks are pinned; what they hold of them ends with the process.

    At most `share` of a tier's capacity is held: beyond that pinned blocks lie there like others.
    `object_bytes` says what a group's part of a block takes in a tier.
    """

    def __init__(
        self, stack: TierStack, num_groups: int, object_bytes: Callable[[int], int]
    ) -> None:
        self._tiers = [stack.tiers[at] for at in stack.local]
        self._groups = range(num_groups)
        self._object_bytes = object_bytes
        self._held: list[dict[StoredKey, int]] = [{} for _ in self._tiers]
        self._held_bytes = [0] * len(self._tiers)
        self.share = 1.0

    def check_room(self, keys: Collection[BlockKey]) -> None:
        """Raise PinCapacityError where what tiers have of these is more than may be held there."""
        for tier in self._tiers:
            if tier.capacity_bytes is None:
                continue
            wanted, most = 0, int(self.share * tier.capacity_bytes)
            for group in self._groups:
                there = tier.find([stored_key(key, group) for key in keys])
                wanted += there.count(Presence.PRESENT) * self._object_bytes(group)
            if wanted > most:
                raise PinCapacityError(
                    f"pins would keep {wanted} bytes of tier {tier.name!r}, and may keep {most} (pin_share="
                    f"{self.share:g} of it); unpin something, raise pin_share, or give the tier more capacity"
                )

    def hold(self, keys: Iterable[BlockKey]) -> None:
        """Let tiers keep what they have of these, as far as there is a share left."""
        stored = list(self._stored(keys))
        for at, tier in enumerate(self._tiers):
            most = self.share * (tier.capacity_bytes or 0)
            for key in stored:
                num_bytes, held = self._object_bytes(key[-1]), self._held[at]
                # One that came back under its key is not held any more, whatever is noted here.
                if key not in held and self._held_bytes[at] + num_bytes > most:
                    continue
                if tier.hold((key,))[0] and key not in held:
                    held[key] = num_bytes
                    self._held_bytes[at] += num_bytes

    def let_go(self, keys: Iterable[BlockKey]) -> None:
        """Let tiers evict these again."""
        if not any(self._held):
            return
        stored = list(self._stored(keys))
        for at, tier in enumerate(self._tiers):
            own = [key for key in stored if key in self._held[at]]
            for key in own:
                self._held_bytes[at] -= self._held[at].pop(key)
            if own:
                tier.let_go(own)

    def held_bytes(self) -> dict[str, int]:
        """Bytes that pins hold in each tier of this machine."""
        return {tier.name: self._held_bytes[at] for at, tier in enumerate(self._tiers)}

    def num_held(self, keys: Iterable[BlockKey]) -> dict[str, int]:
        """How many objects of these blocks each tier holds, where it holds any."""
        stored = list(self._stored(keys))
        counts = {
            tier.name: sum(key in self._held[at] for key in stored)
            for at, tier in enumerate(self._tiers)
        }
        return {name: count for name, count in counts.items() if count}

    def _stored(self, keys: Iterable[BlockKey]) -> Iterable[StoredKey]:
        return (stored_key(key, group) for key in keys for group in self._groups)
