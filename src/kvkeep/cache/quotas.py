"""Quotas: how many bytes the blocks of a tenant may take, altogether or in one place."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from kvkeep.blocks import stored_key
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lifetimes import Register
from kvkeep.cache.places import Places
from kvkeep.errors import PinCapacityError, RequestError
from kvkeep.planning import DEVICE
from kvkeep.spec import BlockKey
from kvkeep.tiers.base import Presence

__all__ = ["Quotas", "Share"]

# What goes at once beyond what must, so that not every request has to make room.
_SLACK = 0.05


class Share(NamedTuple):
    """What a limit is on: a tenant's blocks on the device, in a tier, or anywhere (None)."""

    namespace: BlockKey
    place: str | None = None


class Quotas:
    """Limits by share. Anywhere a block counts once, as the bytes that all its groups take on the device."""

    def __init__(self, register: Register, places: Places, below: Hierarchy | None) -> None:
        self._register = register
        self._places = places
        self._below = below
        self._groups = range(len(places.ledgers))
        size = places.spec.block_size
        self._block_bytes = sum(group.block_bytes(size) for group in places.spec.groups)
        self._limits: dict[Share, int] = {}

    def set(self, share: Share, limit_bytes: int | None) -> None:
        """Limit a share, or no more with None. Raises RequestError for a place that cannot be limited."""
        self._check_place(share.place)
        if limit_bytes is None:
            self._limits.pop(share, None)
        else:
            self._limits[share] = limit_bytes

    def of(self, namespace: BlockKey) -> list[Share]:
        """What of a tenant's is limited."""
        return [share for share in self._limits if share.namespace == namespace]

    def used_bytes(self, share: Share) -> int:
        """What it takes."""
        return sum(self._bytes_of(share.place, self._own(share)).values())

    def excess(self, share: Share, in_use: Callable[[BlockKey], bool]) -> Collection[BlockKey]:
        """Blocks that are to go for a share to keep its limit, none of them pinned, nor in use where it lies.

        Those of the lowest priority first, of these the longest unused.
        """
        limit = self._limits[share]
        own = self._own(share)
        if len(own) * self._most_bytes(share.place) <= limit:
            return ()
        key_to_bytes = self._bytes_of(share.place, own)
        used = sum(key_to_bytes.values())
        if used <= limit:
            return ()
        excess: list[BlockKey] = []
        is_here = share.place in (None, DEVICE)
        for key in self._least_useful_first(share):
            if used <= limit * (1 - _SLACK):
                break
            if key in key_to_bytes and not (is_here and in_use(key)):
                excess.append(key)
                used -= key_to_bytes[key]
        return excess

    def check_pins(self, namespace: BlockKey, keys: Collection[BlockKey]) -> None:
        """Raise PinCapacityError where a tenant would pin more than it may have: pinned blocks never go."""
        limited = self.of(namespace)
        if not limited:
            return
        pinned = {
            key
            for labels, own in self._register.of_namespace(namespace)
            if labels.pins
            for key in own
        }
        num_pinned = len(pinned.union(keys))
        for share in limited:
            wanted, most = num_pinned * self._most_bytes(share.place), self._limits[share]
            if wanted > most:
                where = "" if share.place is None else f" of {share.place!r}"
                raise PinCapacityError(
                    f"pins would keep {wanted} bytes{where}, and the tenant's quota is {most}; unpin "
                    "something, or raise the quota"
                )

    def _own(self, share: Share) -> Sequence[BlockKey]:
        groups = self._register.of_namespace(share.namespace)
        return [key for _, keys in groups for key in keys]

    def _least_useful_first(self, share: Share) -> list[BlockKey]:
        order = {key: at for at, key in enumerate(self._register)}
        # Within one use the end of a chain goes first: without its beginning it cannot be reused.
        ranked = [
            (labels.priority, self._register.used_at(key) or 0.0, -order[key], key)
            for labels, keys in self._register.of_namespace(share.namespace)
            if not labels.pins
            for key in keys
        ]
        return [key for *_, key in sorted(ranked)]

    def _most_bytes(self, place: str | None) -> int:
        """What a block takes in a place at most."""
        if place in (None, DEVICE):
            return self._block_bytes
        assert self._below is not None
        return sum(map(self._below.object_bytes, self._groups))

    def _bytes_of(self, place: str | None, keys: Sequence[BlockKey]) -> dict[BlockKey, int]:
        """What blocks take in a place, where they lie there."""
        if place is None:
            return dict.fromkeys(keys, self._block_bytes)
        key_to_bytes: dict[BlockKey, int] = {}
        for group in self._groups:
            for key, num_bytes in self._bytes_of_group(place, group, keys).items():
                key_to_bytes[key] = key_to_bytes.get(key, 0) + num_bytes
        return key_to_bytes

    def _bytes_of_group(
        self, place: str, group: int, keys: Sequence[BlockKey]
    ) -> dict[BlockKey, int]:
        if place == DEVICE:
            ledger, size = self._places.ledgers[group], self._places.spec.block_size
            return {
                key: ledger.num_bytes([block], size)
                for key in keys
                if (block := ledger.get(key)) is not None
            }
        assert self._below is not None
        (tier,) = (tier for tier in self._below.stack.tiers if tier.name == place)
        found = tier.find([stored_key(key, group) for key in keys])
        num_bytes = self._below.object_bytes(group)
        return {
            key: num_bytes
            for key, presence in zip(keys, found, strict=True)
            if presence is Presence.PRESENT
        }

    def _check_place(self, place: str | None) -> None:
        stack = None if self._below is None else self._below.stack
        local = [] if stack is None else [stack.tiers[at].name for at in stack.local]
        if place not in (None, DEVICE, *local):
            known = ", ".join([DEVICE, *local])
            raise RequestError(
                f"tier={place!r} cannot have quotas; give one of {known}, since other machines share the rest"
            )
