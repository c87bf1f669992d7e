"""Caches over one server or folder, each of which stands for a machine."""

from math import inf

from kvkeep.tiers.base import Tier
from kvkeep.tiers.resp import RespTier
from tests.lifetime_books import Clock
from tests.lifetime_cache import LifetimeCache
from tests.servers import RedisServer


class Machines:
    """Caches with one clock, closed at the end."""

    def __init__(self, server: RedisServer, prefix: str) -> None:
        self._server = server
        self.prefix = prefix
        self.clock = Clock()
        self._all: list[LifetimeCache] = []

    def start(
        self,
        tier: Tier | None = None,
        *,
        session_ttl_s: float = inf,
        max_clock_skew_s: float = 0.0,
    ) -> LifetimeCache:
        """One more, over a tier or over the server."""
        tier = tier or RespTier(self._server.url, key_prefix=self.prefix, timeout_s=20.0)
        before = self._all[0] if self._all else None
        checked = LifetimeCache(
            self.clock,
            tiers=[tier],
            before=before,
            session_ttl_s=session_ttl_s,
            max_clock_skew_s=max_clock_skew_s,
        )
        self._all.append(checked)
        return checked

    def num_objects(self) -> int:
        """Keys in the server."""
        return len(self._server.run("KEYS", f"{self.prefix}*").split())

    def close(self) -> None:
        """End them all."""
        for checked in self._all:
            checked.cache.close()
