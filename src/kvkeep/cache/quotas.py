"""Quotas: how many bytes the blocks of a tenant may take, each counted once wherever it lies."""

from collections.abc import Callable, Collection

from kvkeep.cache.lifetimes import Register
from kvkeep.spec import BlockKey

__all__ = ["Quotas"]

# What goes at once beyond what must, so that not every request has to make room.
_SLACK = 0.05


class Quotas:
    """Limits by namespace. A block counts as the bytes that it takes on the device, in all groups."""

    def __init__(self, register: Register, block_bytes: int) -> None:
        self._register = register
        self._block_bytes = block_bytes
        self._limits: dict[BlockKey, int] = {}

    @property
    def limits(self) -> dict[BlockKey, int]:
        """All limits, in bytes, by namespace."""
        return dict(self._limits)

    def set(self, namespace: BlockKey, limit_bytes: int | None) -> None:
        """Limit a tenant, or no more with None."""
        if limit_bytes is None:
            self._limits.pop(namespace, None)
        else:
            self._limits[namespace] = limit_bytes

    def used_bytes(self, namespace: BlockKey) -> int:
        """What a tenant's blocks take."""
        groups = self._register.of_namespace(namespace)
        return self._block_bytes * sum(len(keys) for _, keys in groups)

    def excess(
        self, namespace: BlockKey, in_use: Callable[[BlockKey], bool]
    ) -> Collection[BlockKey]:
        """Blocks that are to go for a tenant to keep its limit: the longest unused that nobody has pinned."""
        limit = self._limits.get(namespace)
        if limit is None or self.used_bytes(namespace) <= limit:
            return ()
        most = int(limit * (1 - _SLACK)) // self._block_bytes
        keys = {key for _, own in self._register.of_namespace(namespace) for key in own}
        free = [
            key
            for labels, own in self._register.of_namespace(namespace)
            if not labels.pins
            for key in own
        ]
        # Within one use the end of a chain goes first: without its beginning it cannot be reused.
        free = [key for key in self._in_order_of_use(free) if not in_use(key)]
        return free[: max(0, len(keys) - most)]

    def _in_order_of_use(self, keys: list[BlockKey]) -> list[BlockKey]:
        order = {key: at for at, key in enumerate(self._register)}
        return sorted(
            keys, key=lambda key: (self._register.used_at(key) or 0.0, -order.get(key, 0))
        )
