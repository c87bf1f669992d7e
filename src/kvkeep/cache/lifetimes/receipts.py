"""Counted answers about the life of blocks."""

from dataclasses import dataclass, field

from kvkeep.cache.lifetimes.labels import PinId
from kvkeep.spec import BlockKey

__all__ = ["BlockReport", "PinReport", "PurgeReceipt", "QuotaReport", "SessionReport"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PurgeReceipt:
    """What a purge, an expiry or the end of a session forgot: `matched == deleted + skipped_pinned`.

    `matched` and `deleted` count blocks, `stored` objects in each tier, by its name (a block has one for each
    KV group), `freed_bytes` the bytes of both. `in_use` blocks stay with the requests that hold them, as
    their own. Tiers that are `not_reached` did not answer: what they have of it is not served, and goes when
    they do. With `dry_run` nothing was done, and the numbers are what would be.
    """

    matched: int = 0
    deleted: int = 0
    freed_bytes: int = 0
    skipped_pinned: int = 0
    in_use: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    not_reached: tuple[str, ...] = ()
    dry_run: bool = False

    def __add__(self, other: "PurgeReceipt") -> "PurgeReceipt":
        """Both together."""
        names = [*self.stored, *(name for name in other.stored if name not in self.stored)]
        return PurgeReceipt(
            matched=self.matched + other.matched,
            deleted=self.deleted + other.deleted,
            freed_bytes=self.freed_bytes + other.freed_bytes,
            skipped_pinned=self.skipped_pinned + other.skipped_pinned,
            in_use=self.in_use + other.in_use,
            stored={name: self.stored.get(name, 0) + other.stored.get(name, 0) for name in names},
            not_reached=tuple(sorted({*self.not_reached, *other.not_reached})),
            dry_run=self.dry_run or other.dry_run,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionReport:
    """A session, its blocks, those of them that go with it, and when it was used, in seconds since 1970.

    `num_tokens` is the length of its last request, prompt and output; 0 where that was before the start.
    """

    name: str
    namespace: BlockKey
    num_blocks: int
    num_own_blocks: int
    num_tokens: int
    num_requests: int
    num_running: int
    context: str | None
    created_at: float
    used_at: float
    ends_at: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PinReport:
    """A pin, the blocks that it means, and how many of them are held on the device.

    `stored` counts the objects that are held in each tier of this machine, by its name.
    """

    name: PinId
    namespace: BlockKey
    num_blocks: int
    num_on_device: int
    stored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotaReport:
    """A tenant's share: what its blocks take of `limit_bytes` in a tier, "device" included.

    Without `tier` it is what they take anywhere, each counted once.
    """

    salt: str
    limit_bytes: int
    used_bytes: int
    tier: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReport:
    """One block: what it bears and where it lies, "device" or a tier's name.

    Times are seconds since 1970; `expires_at` is None where nothing ends its life.
    """

    key: BlockKey
    namespace: BlockKey
    places: tuple[str, ...]
    num_bytes: int
    sessions: tuple[str, ...]
    is_shared: bool
    tags: tuple[str, ...]
    pins: tuple[str, ...]
    priority: int
    created_at: float
    used_at: float | None
    expires_at: float | None
