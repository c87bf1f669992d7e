"""What the tests of the tier suite share: how a tier is opened, and what must hold of an object."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kvkeep.spec import StoredKey
from kvkeep.testing.tier_contents import content_of, read_object
from kvkeep.tiers.base import Miss, MissCause, Presence, Tier

__all__ = ["CAPACITY_BYTES", "TierChecks"]

CAPACITY_BYTES = 4 << 20


class TierChecks(ABC):
    """Opens the tier under test; the docstring of TierSuite says how to use it."""

    keeps_bytes: ClassVar[bool] = True
    evicts_oldest_first: ClassVar[bool] = True

    @abstractmethod
    def open_tier(self, folder: Path, capacity_bytes: int) -> Tier:
        """A tier that holds at most `capacity_bytes`, if that is its own to decide."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """An empty tier of a few megabytes."""
        with self.open_tier(tmp_path, CAPACITY_BYTES) as tier:
            yield tier

    def assert_holds(self, tier: Tier, key: StoredKey, num_bytes: int) -> None:
        """The object is there, with the bytes of its key."""
        assert tier.find([key]) == [Presence.PRESENT]
        found = read_object(tier, key, num_bytes)
        assert not isinstance(found, Miss), found
        assert not self.keeps_bytes or found == content_of(key, num_bytes)

    def assert_lacks(self, tier: Tier, key: StoredKey, num_bytes: int) -> None:
        """Nothing is there."""
        assert tier.find([key]) == [Presence.ABSENT]
        found = read_object(tier, key, num_bytes)
        assert isinstance(found, Miss)
        assert found.cause is MissCause.ABSENT
        assert key not in {item.key for item in tier.objects()}

    def needs_bytes(self) -> None:
        """Skip the test for a tier whose objects have no bytes."""
        if not self.keeps_bytes:
            pytest.skip("its objects have no bytes: puts read no parts and take no time")

    def capacity_of(self, tier: Tier) -> int:
        """The capacity; skips the test where somebody else decides it."""
        if tier.capacity_bytes is None:
            pytest.skip("its capacity is bounded by somebody else")
        return tier.capacity_bytes
