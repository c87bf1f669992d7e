"""Keys whose blocks were given up lately, and why."""

from collections import Counter
from collections.abc import Collection
from itertools import islice

from kvkeep.cache.explain.miss import MissType
from kvkeep.spec import BlockKey

__all__ = ["GoneKeys"]


class GoneKeys:
    """The last `capacity` keys that were forgotten, and up to an eighth more; the oldest go first."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self._capacity = capacity
        self._key_to_reason: dict[BlockKey, MissType] = {}
        # Since the start, also of those that are no longer remembered.
        self.reason_to_count: Counter[MissType] = Counter()

    def __len__(self) -> int:
        return len(self._key_to_reason)

    def note(self, keys: Collection[BlockKey], reason: MissType) -> None:
        """These are forgotten; what is said last of a key holds."""
        self._key_to_reason.update(dict.fromkeys(keys, reason))
        self.reason_to_count[reason] += len(keys)
        excess = len(self._key_to_reason) - self._capacity
        # Many at a time: a dict takes long to find its first key when those before it are deleted.
        if excess > self._capacity // 8:
            for key in list(islice(self._key_to_reason, excess)):
                del self._key_to_reason[key]

    def reason(self, key: BlockKey) -> MissType | None:
        """Why a key was forgotten, None when that is not known."""
        return self._key_to_reason.get(key)
