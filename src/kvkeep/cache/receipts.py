"""Counted answers: what was reused, dropped, is held, or is wrong."""

from dataclasses import dataclass, field

from kvkeep.cache.explain.miss import Miss
from kvkeep.planning import PlannerStats
from kvkeep.tiers.base import TierStats

__all__ = [
    "CacheStats",
    "CopyReport",
    "DropReceipt",
    "GroupStats",
    "Receipt",
    "TierReport",
    "VerifyReport",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What one request cost: `prompt_tokens == reused_tokens + computed_tokens`.

    `tokens_by_source` splits the prompt tokens by where their K/V came from: "device", a tier's
    name, or "computed". `recomputed_tokens` were computed again after the request was preempted.
    `load_failures` counts, by cause, the blocks that a tier did not give and that were computed instead.
    `miss` says why not more was reused, to requests that asked.

    In seconds: `queue_s` went by before its first step, None if there was none. `restore_s` is from the start
    of loading to the last block that came, a part of it in the queue and the rest beside computing.
    `saved_s` estimates what computing the reused tokens would have taken, by what steps take here; None
    while that is not known.

    `pin` is the name of what the request has pinned. `expires_at`, for requests that asked why they missed,
    is when the first of the prompt's blocks is served no more, in seconds since 1970; infinite for never.
    """

    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    output_tokens: int
    tokens_by_source: dict[str, int] = field(default_factory=dict)
    recomputed_tokens: int = 0
    num_preemptions: int = 0
    load_failures: dict[str, int] = field(default_factory=dict)
    miss: Miss | None = None
    queue_s: float | None = None
    restore_s: float = 0.0
    saved_s: float | None = None
    pin: str | None = None
    expires_at: float | None = None
    first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DropReceipt:
    """What a drop or clear forgot on the device, and how many objects in each tier, by its name.

    Blocks held by running requests stay with these alone.
    """

    num_blocks: int
    num_bytes: int
    num_held: int
    stored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStats:
    """Blocks of one KV group: `in_use + reusable + free == num_blocks`. First blocks may be apart."""

    name: str
    layers: tuple[int, ...]
    num_blocks: int
    block_bytes: int
    in_use: int
    reusable: int
    free: int
    num_evictions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """What the device arena holds, in bytes: `in_use + reusable + free == capacity`.

    `groups` has an entry for each of `KVSpec.block_classes`.
    """

    capacity_bytes: int
    in_use_bytes: int
    reusable_bytes: int
    free_bytes: int
    open_leases: int
    reused_tokens: int
    computed_tokens: int
    groups: tuple[GroupStats, ...]
    tiers: tuple["TierReport", ...] = ()
    copies: "CopyReport | None" = None
    planner: PlannerStats | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyReport:
    """Blocks that went down, by occasion, and those that were lost on the way.

    `num_failed` counts copies that no tier took. `num_dropped` had to go while those before them were still
    being written: they were forgotten.
    """

    blocks_by_occasion: dict[str, int]
    num_failed: int
    num_dropped: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TierReport:
    """What a tier holds, and what this cache has loaded from it; `load_failures` counts blocks by cause."""

    tier: TierStats
    num_loaded: int
    loaded_bytes: int
    load_seconds: float
    load_failures: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What `verify` found; `problems` is empty when every invariant holds."""

    blocks_checked: int
    problems: tuple[str, ...]

    def __add__(self, other: "VerifyReport") -> "VerifyReport":
        return VerifyReport(
            blocks_checked=self.blocks_checked + other.blocks_checked,
            problems=self.problems + other.problems,
        )

    @property
    def ok(self) -> bool:
        """Whether every invariant holds."""
        return not self.problems
