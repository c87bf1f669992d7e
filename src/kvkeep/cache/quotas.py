"""Quotas: how many bytes the blocks of a tenant may take, altogether or in one place."""

from collections.abc import Callable, Collection, Iterator, Sequence
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
        if share.place is None:
            return self._num_own(share) * self._block_bytes
        own = self._own(share)
        return sum(self._used_in_group(share.place, group, own) for group in self._groups)

    def excess(self, share: Share, in_use: Callable[[BlockKey], bool]) -> Collection[BlockKey]:
        """Blocks that are to go for a share to keep its limit, none of them pinned, nor in use where it lies.

        Those of the lowest priority first, of these the longest unused.
        """
        limit = self._limits[share]
        if self._num_own(share) * self._most_bytes(share.place) <= limit:
            return ()
        used = self.used_bytes(share)
        if used <= limit:
            return ()
        return self._least_useful(share, used - limit * (1 - _SLACK), in_use)

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

    def _num_own(self, share: Share) -> int:
        return sum(len(keys) for _, keys in self._register.of_namespace(share.namespace))

    def _least_useful(
        self, share: Share, num_bytes: float, in_use: Callable[[BlockKey], bool]
    ) -> Sequence[BlockKey]:
        """The first to go that take so many bytes, or all that may go."""
        is_here = share.place in (None, DEVICE)
        key_to_bytes: dict[BlockKey, int] = {}
        key_to_rank: dict[BlockKey, int] = {}
        num_reached = 0
        for rank, keys in enumerate(self._by_use(share)):
            if num_reached >= num_bytes:
                break
            for key, taken in self._bytes_of(share.place, keys).items():
                if not (is_here and in_use(key)):
                    key_to_bytes[key], key_to_rank[key] = taken, rank
                    num_reached += taken
        # Within one use the end of a chain goes first: without its beginning it cannot be reused.
        latest_first = [key for key in self._register if key in key_to_rank][::-1]
        excess: list[BlockKey] = []
        for key in sorted(latest_first, key=key_to_rank.__getitem__):
            if num_bytes <= 0:
                break
            excess.append(key)
            num_bytes -= key_to_bytes[key]
        return excess

    def _by_use(self, share: Share) -> Iterator[Sequence[BlockKey]]:
        """Blocks that are not pinned, those of one priority and last use together, the least useful first."""
        used_at = self._register.used_at
        ranked: dict[tuple[int, float], list[BlockKey]] = {}
        for labels, keys in self._register.of_namespace(share.namespace):
            for key in () if labels.pins else keys:
                ranked.setdefault((labels.priority, used_at(key) or 0.0), []).append(key)
        return (ranked[rank] for rank in sorted(ranked))

    def _most_bytes(self, place: str | None) -> int:
        """What a block takes in a place at most."""
        if place in (None, DEVICE):
            return self._block_bytes
        return sum(map(self._object_bytes, self._groups))

    def _used_in_group(self, place: str, group: int, keys: Sequence[BlockKey]) -> int:
        if place == DEVICE:
            ledger = self._places.ledgers[group]
            blocks = [block for block in map(ledger.get, keys) if block is not None]
            return ledger.num_bytes(blocks, self._places.spec.block_size)
        found = self._find(place, group, keys)
        return found.count(Presence.PRESENT) * self._object_bytes(group)

    def _bytes_of(self, place: str | None, keys: Collection[BlockKey]) -> dict[BlockKey, int]:
        """What blocks take in a place, where they lie there."""
        if place is None:
            return dict.fromkeys(keys, self._block_bytes)
        key_to_bytes: dict[BlockKey, int] = {}
        for group in self._groups:
            for key, num_bytes in self._bytes_of_group(place, group, keys).items():
                key_to_bytes[key] = key_to_bytes.get(key, 0) + num_bytes
        return key_to_bytes

    def _bytes_of_group(
        self, place: str, group: int, keys: Collection[BlockKey]
    ) -> dict[BlockKey, int]:
        if place == DEVICE:
            ledger = self._places.ledgers[group]
            here = [(key, block) for key in keys if (block := ledger.get(key)) is not None]
            counts = [ledger.pool.counts((block,)) for _, block in here]
            size = self._places.spec.block_size
            # A ledger has blocks of two sizes at most.
            counts_to_bytes = {
                count: ledger.num_bytes((block,), size)
                for count, (_, block) in dict(zip(counts, here, strict=True)).items()
            }
            return {
                key: counts_to_bytes[count] for (key, _), count in zip(here, counts, strict=True)
            }
        found = self._find(place, group, keys)
        num_bytes = self._object_bytes(group)
        return {
            key: num_bytes
            for key, presence in zip(keys, found, strict=True)
            if presence is Presence.PRESENT
        }

    def _find(self, place: str, group: int, keys: Collection[BlockKey]) -> list[Presence]:
        assert self._below is not None
        (tier,) = (tier for tier in self._below.stack.tiers if tier.name == place)
        return tier.find([stored_key(key, group) for key in keys])

    def _object_bytes(self, group: int) -> int:
        assert self._below is not None
        return self._below.object_bytes(group)

    def _check_place(self, place: str | None) -> None:
        stack = None if self._below is None else self._below.stack
        local = [] if stack is None else [stack.tiers[at].name for at in stack.local]
        if place not in (None, DEVICE, *local):
            known = ", ".join([DEVICE, *local])
            raise RequestError(
                f"tier={place!r} cannot have quotas; give one of {known}, since other machines share the rest"
            )
