"""A line for the log about the state of the whole server."""

from kvkeep.cache import CacheStats
from kvkeep.server.service import Service

__all__ = ["StatusLine"]


class StatusLine:
    """Says how many requests there are, how full the cache is, and how much of the prompts it had."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: tuple[int, ...] | None = None

    async def next(self) -> str:
        """The line, or nothing when nothing has happened since the last one."""
        engine = self._service.engine
        num_open, num_running, num_waiting = engine.num_open, engine.num_running, engine.num_waiting
        stats = await self._service.call(lambda llm: llm.cache.stats())
        # The last line must not say that there is something running for ever.
        counted = (num_running, num_waiting, stats.reused_tokens, stats.computed_tokens)
        if not num_open and counted == self._last:
            return ""
        self._last = counted
        return (
            f"running {num_running} · waiting {num_waiting} · "
            f"KV {_percent(stats.in_use_bytes, stats.capacity_bytes)} in use, "
            f"{_percent(stats.reusable_bytes, stats.capacity_bytes)} reusable · {_hits(stats)}"
        )


def _hits(stats: CacheStats) -> str:
    total = stats.reused_tokens + stats.computed_tokens
    return f"{_percent(stats.reused_tokens, total)} of {total} tokens reused"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"
