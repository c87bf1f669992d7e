"""What happens to the cache, as server-sent events: requests as they end, purges, and counts by the second.

Nobody waits for a subscriber: one that reads too slowly loses events, and is told how many. A tenant hears
of its own requests and purges; what is not of one tenant, only who may hear all.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import time
from typing import Any

from kvkeep.cache import CacheStats, PurgeReceipt
from kvkeep.cache.explain import MissType
from kvkeep.engine.async_engine import EngineDownError
from kvkeep.llm import LLM
from kvkeep.metrics import reuse_class
from kvkeep.server.auth import TenantId
from kvkeep.server.cache_work import purge_fields
from kvkeep.server.errors import ApiError
from kvkeep.server.service import Finished, Service, ServiceState
from kvkeep.server.sse import KEEP_ALIVE, event
from kvkeep.tiers.base import PutOutcome

__all__ = ["EventFeed", "Look", "changes"]

_MOST_WAITING = 1024
_POLL_S = 1.0
_MOST_SUBSCRIBERS = 64
# So that one tenant cannot take all of them.
_MOST_OF_A_TENANT = 8
# Between two looks whether the server stops.
_LOOK_S = 0.5
_ENDED = (ServiceState.STOPPING, ServiceState.FAILED)


class EventFeed:
    """Passes events on to whoever has subscribed. Belongs to the event loop of its service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._inboxes: set[_Inbox] = set()
        self._polling: asyncio.Task[None] | None = None

    @property
    def num_subscribers(self) -> int:
        """Streams that are open."""
        return len(self._inboxes)

    def publish(
        self, kind: str, fields: Mapping[str, Any], *, owner: TenantId | None = None
    ) -> None:
        """Tell those who hear all, and the tenant that it is about; does nothing without subscribers."""
        inboxes = [one for one in self._inboxes if one.tenant in (None, owner)]
        if inboxes:
            body = {"type": kind, "at": round(time(), 3), **fields}
            encoded = event(json.dumps(body).encode(), kind)
            for inbox in inboxes:
                inbox.put(encoded)

    def observe(self, finished: Finished) -> None:
        """Tell of a job that has ended: an observer of the service."""
        receipt = finished.receipt
        if receipt is None or not self._inboxes:
            return
        owner = finished.job.tenant.tenant_id
        fields = {
            "request_id": finished.job.request_id,
            "tenant": owner,
            "session": finished.job.options.session,
            "prompt_tokens": receipt.prompt_tokens,
            "reused_tokens": receipt.reused_tokens,
            "tokens_by_source": receipt.tokens_by_source,
        }
        block_size = self._service.llm.settings.block_size
        reuse = reuse_class(receipt.prompt_tokens, receipt.reused_tokens, block_size)
        self.publish("miss" if reuse == "miss" else "hit", fields, owner=owner)
        if finished.job.options.write and receipt.computed_tokens:
            stored = {**fields, "computed_tokens": receipt.computed_tokens}
            self.publish("stored", stored, owner=owner)

    def purged(self, receipt: PurgeReceipt, owner: TenantId | None = None) -> None:
        """Tell of a purge that was done, of all, or of what one tenant has."""
        if not receipt.dry_run:
            self.publish("purged", purge_fields(receipt), owner=owner)

    def stream(
        self, *, keep_alive_s: float, tenant: TenantId | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Events from its start on, all or those of a tenant, with comments while there are none.

        Raises ApiError 429 where there are too many streams.
        """
        own = sum(one.tenant == tenant for one in self._inboxes)
        most = _MOST_SUBSCRIBERS if tenant is None else _MOST_OF_A_TENANT
        if own >= most or len(self._inboxes) >= _MOST_SUBSCRIBERS:
            num_open = own if own >= most else len(self._inboxes)
            raise ApiError(429, f"{num_open} streams of events are open; close some first")
        return self._stream(keep_alive_s, tenant)

    async def _stream(
        self, keep_alive_s: float, tenant: TenantId | None
    ) -> AsyncGenerator[bytes, None]:
        inbox = _Inbox(tenant)
        self._inboxes.add(inbox)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        try:
            # At once, so that the client knows that from here on it misses nothing.
            yield event(
                json.dumps({"type": "subscribed", "at": round(time(), 3)}).encode(), "subscribed"
            )
            silent_s = 0.0
            # A stream that nobody ends would hold up the end of the server.
            while self._service.state not in _ENDED:
                pause_s = min(_LOOK_S, keep_alive_s)
                found = await inbox.get(pause_s)
                silent_s = 0.0 if found else silent_s + pause_s
                if found or silent_s >= keep_alive_s:
                    silent_s = 0.0
                    yield found or KEEP_ALIVE
        finally:
            self._inboxes.discard(inbox)
            if not self._inboxes and self._polling is not None:
                self._polling.cancel()
                self._polling = None

    async def _poll(self) -> None:
        """Say once a second what the counters of the cache have gained."""
        before: Look | None = None
        while True:
            with suppress(ApiError, EngineDownError):
                now = await self._service.call(_look)
                if before is not None:
                    for kind, fields in changes(before, now):
                        self.publish(kind, fields)
                before = now
            await asyncio.sleep(_POLL_S)


@dataclass(frozen=True, slots=True)
class Look:
    """Counters at one point in time."""

    stats: CacheStats
    num_expired: int


def _look(llm: LLM) -> Look:
    return Look(llm.cache.stats(), llm.engine.history.num_gone(MissType.EXPIRED))


def changes(before: Look, now: Look) -> list[tuple[str, dict[str, Any]]]:
    """What happened between two looks at the counters, by kind of event and place."""
    found: list[tuple[str, dict[str, Any]]] = []
    evicted = sum(group.num_evictions for group in now.stats.groups)
    evicted -= sum(group.num_evictions for group in before.stats.groups)
    if evicted > 0:
        found.append(("evicted", {"tier": "device", "blocks": evicted}))
    if now.num_expired > before.num_expired:
        found.append(("expired", {"blocks": now.num_expired - before.num_expired}))
    name_to_before = {report.tier.name: report for report in before.stats.tiers}
    for report in now.stats.tiers:
        old = name_to_before.get(report.tier.name)
        if old is None:
            continue
        gained = {
            "evicted": report.tier.num_evictions - old.tier.num_evictions,
            "promoted": report.num_loaded - old.num_loaded,
            "demoted": _stored(report.tier.puts) - _stored(old.tier.puts),
        }
        for kind, num_blocks in gained.items():
            if num_blocks > 0:
                found.append((kind, {"tier": report.tier.name, "blocks": num_blocks}))
        failed = Counter(report.load_failures)
        failed.subtract(old.load_failures)
        found += [
            ("load_failed", {"tier": report.tier.name, "cause": cause, "blocks": count})
            for cause, count in failed.items()
            if count > 0
        ]
    return found


def _stored(puts: Mapping[str, int]) -> int:
    return puts.get(PutOutcome.STORED, 0)


class _Inbox:
    """Events for one subscriber, the newest so many; those of a tenant, or None for all."""

    def __init__(self, tenant: TenantId | None) -> None:
        self.tenant = tenant
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(_MOST_WAITING)
        self._num_lost = 0

    def put(self, encoded: bytes) -> None:
        if self._queue.full():
            self._queue.get_nowait()
            self._num_lost += 1
        self._queue.put_nowait(encoded)

    async def get(self, timeout_s: float) -> bytes | None:
        """The next event, None when none comes in time; before it how many were lost."""
        if self._num_lost:
            lost, self._num_lost = self._num_lost, 0
            return event(json.dumps({"type": "lost", "events": lost}).encode(), "lost")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._queue.get()
        except TimeoutError:
            return None
