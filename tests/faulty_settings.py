"""A tier below an LLM around which things go wrong on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Occasion, Tier
from kvkeep.tiers.host import HostTier

__all__ = ["FaultyHost"]


@dataclass(frozen=True, kw_only=True)
class FaultyHost:
    """Settings of memory with faults. `opened` has the tier once an LLM is made with them."""

    faults: tuple[Fault, ...]
    kind: str = "host"
    name: str | None = None
    write_on: Sequence[str] = tuple(Occasion)
    opened: list[FaultyTier] = field(default_factory=list)

    def open(self, name: str) -> Tier:
        """Memory for the blocks of a tiny model."""
        self.opened.append(FaultyTier(HostTier(2**24, name=name), self.faults))
        return self.opened[-1]
