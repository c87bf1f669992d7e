"""A cache with a clock set by hand, perhaps over a real disk, for tests of lifetimes."""

from collections.abc import Sequence
from pathlib import Path

from kvkeep.cache import Lifetimes, LifetimeSettings, Query, Selector, SessionId
from kvkeep.spec import BlockKey, GroupSpec
from kvkeep.tiers.base import Occasion, Tier
from kvkeep.tiers.disk import DiskTier
from kvkeep.tiers.stack import Floor
from tests.content_store import CheckedCache, full, spec_of
from tests.lifetime_books import Clock

ALL = frozenset(Occasion)
MANY = 1 << 26


class LifetimeCache(CheckedCache):
    """A CheckedCache that takes orders by names and salts, as PromptCache does.

    `before` is another one over the same tiers.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        tiers: Sequence[Tier] = (),
        groups: tuple[GroupSpec, ...] = (),
        room: int = 256,
        before: "LifetimeCache | None" = None,
        write_on: frozenset[Occasion] = ALL,
        **settings: float,
    ) -> None:
        spec = spec_of(*(groups or (full(),)))
        self.clock = clock
        self.lifetimes = Lifetimes(LifetimeSettings(**settings), clock=clock)
        super().__init__(
            spec,
            [room] * len(spec.block_classes),
            floors=[Floor(tier, write_on) for tier in tiers],
            lifetimes=self.lifetimes,
        )
        if before is not None:
            # What is on a disk is in the words of the store that wrote it.
            self.store._prefixes = before.store._prefixes
        self.admin = self.cache.administration

    def root(self, salt: str | None = None) -> BlockKey:
        """The namespace of a tenant."""
        return self.chain([0], salt or "").root

    def query(self, **fields: object) -> Query:
        """What a Selector of these fields means now."""
        selector = Selector(**fields)  # type: ignore[arg-type]
        return selector.resolve(self.root, self.clock())

    def session_id(self, name: str, salt: str | None = None) -> SessionId:
        """A session of a tenant."""
        return SessionId(self.root(salt), name)

    def known(self, token_ids: Sequence[int], salt: str | None = None) -> list[bool]:
        """For each full block of a prompt, whether a request would find it.

        The last token is computed for its logits, whatever is known.
        """
        size = self.spec.block_size
        chain = self.chain([*token_ids, 0], salt or "")
        gaps = self.cache.gaps(chain)
        return [
            all(gap.stop <= start or gap.start >= start + size for gap in gaps)
            for start in range(0, len(token_ids) // size * size, size)
        ]


def disk(folder: Path) -> DiskTier:
    """A folder with room for everything."""
    return DiskTier(folder, MANY)
