"""What is counted: the shapes of receipts and counts that `Metrics` reads.

Described here and made above: this layer knows neither the cache nor the engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

__all__ = [
    "COMPUTED",
    "DEVICE",
    "CacheCounts",
    "GroupCounts",
    "PlannerCounts",
    "ReceiptCounts",
    "Snapshot",
    "TierCounts",
    "TierMoves",
]

# Two values of the label `source`, and the first of the label `tier`; the others are names of tiers.
DEVICE = "device"
COMPUTED = "computed"


class ReceiptCounts(Protocol):
    """What one request cost; see kvkeep.cache.Receipt."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def reused_tokens(self) -> int: ...
    @property
    def computed_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def tokens_by_source(self) -> Mapping[str, int]: ...
    @property
    def recomputed_tokens(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...


class GroupCounts(Protocol):
    """Blocks of one KV group on the device; see kvkeep.cache.GroupStats."""

    @property
    def name(self) -> str: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def in_use(self) -> int: ...
    @property
    def reusable(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def num_evictions(self) -> int: ...


class TierCounts(Protocol):
    """What a tier holds and did; see kvkeep.tiers.base.TierStats."""

    @property
    def name(self) -> str: ...
    @property
    def capacity_bytes(self) -> int | None: ...
    @property
    def in_use_bytes(self) -> int: ...
    @property
    def reusable_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int | None: ...
    @property
    def num_objects(self) -> int: ...
    @property
    def num_evictions(self) -> int: ...
    @property
    def misses(self) -> Mapping[str, int]: ...
    @property
    def puts(self) -> Mapping[str, int]: ...


class TierMoves(Protocol):
    """A tier, and what was loaded from it; see kvkeep.cache.TierReport."""

    @property
    def tier(self) -> TierCounts: ...
    @property
    def num_loaded(self) -> int: ...
    @property
    def loaded_bytes(self) -> int: ...
    @property
    def load_seconds(self) -> float: ...
    @property
    def load_failures(self) -> Mapping[str, int]: ...


class PlannerCounts(Protocol):
    """Decisions between loading and computing; see kvkeep.planning.PlannerStats."""

    @property
    def num_decisions(self) -> Mapping[str, int]: ...
    @property
    def predicted_s(self) -> float: ...
    @property
    def actual_s(self) -> float: ...


class CacheCounts(Protocol):
    """What the device and the tiers hold; see kvkeep.cache.CacheStats."""

    @property
    def capacity_bytes(self) -> int: ...
    @property
    def in_use_bytes(self) -> int: ...
    @property
    def reusable_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def groups(self) -> Sequence[GroupCounts]: ...
    @property
    def tiers(self) -> Sequence[TierMoves]: ...
    @property
    def planner(self) -> PlannerCounts | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that is looked up when metrics are asked for: the queue, and what the cache reports.

    `cache` is None while there is no model, or it does not answer. `removed` counts blocks that are not known
    any more since the start, by reason; `num_pinned` are blocks that pins keep. `facts` describe the cache in
    words and numbers, such as its block size.
    """

    is_healthy: bool
    num_running: int
    num_waiting: int
    cache: CacheCounts | None
    removed: Mapping[str, int] = field(default_factory=dict)
    num_sessions: int = 0
    num_pinned: int = 0
    facts: Mapping[str, str] = field(default_factory=dict)
