"""The feed of events: requests and purges as they happen, and subscribers who do not read."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest

from kvkeep.cache import CacheStats, GroupStats, TierReport
from kvkeep.cache.lifetimes import PurgeReceipt
from kvkeep.server.errors import ApiError
from kvkeep.server.events import EventFeed, Look, changes
from kvkeep.server.service import Service, ServiceState
from kvkeep.tiers.base import TierStats
from tests.running_server import RunningServer

TEXT = "The herons of the estuary nest in the tall pines behind the chapel. " * 6
STATS = CacheStats(
    capacity_bytes=0, in_use_bytes=0, reusable_bytes=0, free_bytes=0, open_leases=0,
    reused_tokens=0, computed_tokens=0,
    groups=(
        GroupStats(
            name="full", layers=(0,), num_blocks=8, block_bytes=1, in_use=0, reusable=0, free=8,
            num_evictions=3,
        ),
    ),
    tiers=(
        TierReport(
            tier=TierStats(
                name="disk", capacity_bytes=9, in_use_bytes=0, reusable_bytes=0, free_bytes=9,
                num_objects=0, num_evictions=1, misses={}, puts={"stored": 5, "refused": 2},
            ),
            num_loaded=2, loaded_bytes=0, load_seconds=0.0, load_failures={"late": 1},
        ),
    ),
)  # fmt: skip


class NoService:
    """A service whose cache never answers."""

    state = ServiceState.READY

    async def call(self, work: object) -> None:
        """Wait for ever."""
        await asyncio.Event().wait()


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Events as they come."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_requests_and_purges_are_told_as_they_happen(server: RunningServer) -> None:
    """First nothing is found and all is stored, then all is found, then it is purged."""
    body = {
        "model": "tiny", "prompt": TEXT, "max_tokens": 1,
        "kv_cache": {"session": "s", "tags": ["t"]},
    }  # fmt: skip
    with server.client() as client, client.stream("GET", "/v1/cache/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = events_of(response)
        assert next(events)["type"] == "subscribed"
        with server.client() as other:
            for _ in range(2):
                other.post("/v1/completions", json=body).raise_for_status()
            receipt = other.post("/v1/cache/purge", json={"tags": ["t"]}).json()

        miss, stored, hit, _, purged = (next(events) for _ in range(5))

    assert [miss["type"], stored["type"], hit["type"]] == ["miss", "stored", "hit"]
    assert miss["session"] == "s"
    assert miss["reused_tokens"] == 0
    assert stored["computed_tokens"] == stored["prompt_tokens"]
    assert hit["reused_tokens"] >= hit["prompt_tokens"] - 32
    assert hit["tokens_by_source"]["device"] == hit["reused_tokens"]
    assert purged["type"] == "purged"
    assert purged["deleted"] == receipt["deleted"] > 0
    assert TEXT[:20] not in json.dumps([miss, stored, hit])


def test_an_expiry_is_told(server: RunningServer) -> None:
    """Blocks whose time has passed are counted within about a second, without anybody asking for them."""
    body = {
        "model": "tiny",
        "prompt": f"Soon over. {TEXT}",
        "max_tokens": 1,
        "kv_cache": {"ttl": 0.2},
    }
    with server.client() as client, client.stream("GET", "/v1/cache/events") as response:
        events = events_of(response)
        next(events)
        with server.client() as other:
            other.post("/v1/completions", json=body).raise_for_status()

        expired = next(one for one in events if one["type"] == "expired")

    assert expired["blocks"] >= 2


def test_nothing_happened_is_no_event() -> None:
    """Counters that stand still say nothing."""
    assert changes(Look(STATS, 3), Look(STATS, 3)) == []


def test_what_counters_gain_is_told_by_place() -> None:
    """Evictions of the device and of tiers, promotions, demotions and failed loads, each with its number."""
    (group,), (report,) = STATS.groups, STATS.tiers
    tier = replace(report.tier, num_evictions=4, puts={"stored": 6, "refused": 9})
    now = replace(
        STATS,
        groups=(replace(group, num_evictions=5),),
        tiers=(replace(report, tier=tier, num_loaded=9, load_failures={"late": 1, "corrupt": 2}),),
    )

    assert changes(Look(STATS, 3), Look(now, 7)) == [
        ("evicted", {"tier": "device", "blocks": 2}),
        ("expired", {"blocks": 4}),
        ("evicted", {"tier": "disk", "blocks": 3}),
        ("promoted", {"tier": "disk", "blocks": 7}),
        ("demoted", {"tier": "disk", "blocks": 1}),
        ("load_failed", {"tier": "disk", "cause": "corrupt", "blocks": 2}),
    ]


def test_a_subscriber_that_does_not_read_loses_events_and_is_told() -> None:
    """Nobody waits for it, its memory is bounded, and the newest events are kept."""

    async def run() -> list[dict[str, Any]]:
        feed = EventFeed(cast("Service", NoService()))
        stream = feed.stream(keep_alive_s=0.01)
        first = await anext(stream)
        for number in range(2000):
            feed.publish("hit", {"number": number})
        found = [first]
        while not (part := await anext(stream)).startswith(b":"):
            found.append(part)
        await stream.aclose()
        assert feed.num_subscribers == 0
        return [json.loads(part.split(b"data: ")[1]) for part in found]

    subscribed, lost, *kept = asyncio.run(run())

    assert subscribed["type"] == "subscribed"
    assert lost == {"type": "lost", "events": 2000 - len(kept)}
    assert [one["number"] for one in kept] == list(range(2000 - len(kept), 2000))


def test_a_dry_run_is_no_event() -> None:
    """What was not done is not told; without a subscriber nothing is kept at all."""

    async def run() -> bytes:
        feed = EventFeed(cast("Service", NoService()))
        feed.purged(PurgeReceipt(matched=1))
        stream = feed.stream(keep_alive_s=0.01)
        await anext(stream)
        feed.purged(PurgeReceipt(matched=1, dry_run=True))
        part = await anext(stream)
        await stream.aclose()
        return part

    assert asyncio.run(run()) == b": keep-alive\n\n"


def test_a_stream_ends_when_the_server_stops() -> None:
    """Or its end would wait for whoever listens."""

    async def run() -> list[bytes]:
        service = NoService()
        stream = EventFeed(cast("Service", service)).stream(keep_alive_s=0.01)
        found = [await anext(stream)]
        service.state = ServiceState.STOPPING
        return found + [part async for part in stream]

    assert len(asyncio.run(run())) == 1


def test_there_are_only_so_many_subscribers() -> None:
    """One too many is refused while the others go on."""

    async def run() -> None:
        feed = EventFeed(cast("Service", NoService()))
        streams = []
        for _ in range(64):
            streams.append(feed.stream(keep_alive_s=0.01))
            await anext(streams[-1])
        with pytest.raises(ApiError, match="64 streams of events"):
            feed.stream(keep_alive_s=0.01)
        assert feed.num_subscribers == 64
        for stream in streams:
            await stream.aclose()

    asyncio.run(run())
