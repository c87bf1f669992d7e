"""Families made from what a cache reports of itself, at the moment metrics are asked for."""

from collections.abc import Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvkeep.metrics.base import DEVICE, CacheCounts, PlannerCounts, Snapshot, TierCounts, TierMoves

__all__ = ["snapshot_families"]


def snapshot_families(snapshot: Snapshot) -> list[Metric]:
    """The queue, what the device and the tiers hold, and what came and went between them."""
    families = [
        _gauge("kvkeep_healthy", "1 while requests are served.", snapshot.is_healthy),
        _gauge("kvkeep_requests_running", "Requests that run.", snapshot.num_running),
        _gauge("kvkeep_requests_waiting", "Requests that wait for room.", snapshot.num_waiting),
    ]
    if snapshot.cache is None:
        return families
    removed = CounterMetricFamily(
        "kvkeep_removed_blocks", "Blocks that are not known any more, by why.", labels=["reason"]
    )
    for reason, count in snapshot.removed.items():
        removed.add_metric([str(reason)], count)
    return [
        *families,
        *_cache_families(snapshot.cache),
        _gauge("kvkeep_sessions", "Sessions that have not ended.", snapshot.num_sessions),
        _gauge("kvkeep_pinned_blocks", "Blocks that pins keep.", snapshot.num_pinned),
        removed,
    ]


def _cache_families(cache: CacheCounts) -> list[Metric]:
    families = [
        _gauge(
            "kvkeep_device_usage_ratio",
            "Share of the device's bytes that running requests hold.",
            cache.in_use_bytes / cache.capacity_bytes if cache.capacity_bytes else 0.0,
        ),
        _bytes(cache),
        _capacity(cache),
        _blocks(cache),
        _evictions(cache),
        *_tier_families(cache.tiers),
    ]
    return families + (_planner_families(cache.planner) if cache.planner is not None else [])


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=float(value))


def _bytes(cache: CacheCounts) -> Metric:
    family = GaugeMetricFamily(
        "kvkeep_bytes", "Bytes by place: in_use + reusable + free.", labels=["tier", "state"]
    )
    name_to_place: dict[str, CacheCounts | TierCounts] = {DEVICE: cache}
    name_to_place |= {one.tier.name: one.tier for one in cache.tiers}
    for name, place in name_to_place.items():
        family.add_metric([name, "in_use"], place.in_use_bytes)
        family.add_metric([name, "reusable"], place.reusable_bytes)
        if place.free_bytes is not None:
            family.add_metric([name, "free"], place.free_bytes)
    return family


def _capacity(cache: CacheCounts) -> Metric:
    family = GaugeMetricFamily(
        "kvkeep_capacity_bytes", "The most that a place may hold.", labels=["tier"]
    )
    family.add_metric([DEVICE], cache.capacity_bytes)
    for one in cache.tiers:
        if one.tier.capacity_bytes is not None:
            family.add_metric([one.tier.name], one.tier.capacity_bytes)
    return family


def _blocks(cache: CacheCounts) -> Metric:
    family = GaugeMetricFamily(
        "kvkeep_device_blocks", "Blocks of the device, by KV group.", labels=["group", "state"]
    )
    for group in cache.groups:
        family.add_metric([group.name, "in_use"], group.in_use)
        family.add_metric([group.name, "reusable"], group.reusable)
        family.add_metric([group.name, "free"], group.free)
    return family


def _evictions(cache: CacheCounts) -> Metric:
    family = CounterMetricFamily(
        "kvkeep_evictions", "Blocks that had to make room.", labels=["tier"]
    )
    family.add_metric([DEVICE], sum(group.num_evictions for group in cache.groups))
    for one in cache.tiers:
        family.add_metric([one.tier.name], one.tier.num_evictions)
    return family


def _tier_families(tiers: Sequence[TierMoves]) -> list[Metric]:
    objects = GaugeMetricFamily("kvkeep_tier_objects", "Blocks in a tier.", labels=["tier"])
    for one in tiers:
        objects.add_metric([one.tier.name], one.tier.num_objects)
    return [
        objects,
        _by_tier(
            "kvkeep_loaded_blocks",
            "Blocks that came back to the device.",
            {one.tier.name: one.num_loaded for one in tiers},
        ),
        _by_tier(
            "kvkeep_loaded_bytes",
            "Bytes that came back to the device.",
            {one.tier.name: one.loaded_bytes for one in tiers},
        ),
        _by_tier(
            "kvkeep_load_seconds",
            "Time of all loads together.",
            {one.tier.name: one.load_seconds for one in tiers},
        ),
        _by_kind(
            "kvkeep_load_failures",
            "Blocks that a tier did not give and that were computed, by cause.",
            "cause",
            {one.tier.name: one.load_failures for one in tiers},
        ),
        _by_kind(
            "kvkeep_tier_misses",
            "Reads that gave nothing, by cause.",
            "cause",
            {one.tier.name: one.tier.misses for one in tiers},
        ),
        _by_kind(
            "kvkeep_tier_puts",
            "Writes, by outcome.",
            "outcome",
            {one.tier.name: one.tier.puts for one in tiers},
        ),
    ]


def _by_tier(name: str, documentation: str, tier_to_value: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=["tier"])
    for tier, value in tier_to_value.items():
        family.add_metric([tier], value)
    return family


def _by_kind(
    name: str, documentation: str, label: str, tier_to_counts: Mapping[str, Mapping[str, int]]
) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=["tier", label])
    for tier, counts in tier_to_counts.items():
        for kind, count in counts.items():
            family.add_metric([tier, str(kind)], count)
    return family


def _planner_families(planner: PlannerCounts) -> list[Metric]:
    decisions = CounterMetricFamily(
        "kvkeep_planner_decisions", "Choices between loading and computing.", labels=["kind"]
    )
    for kind, count in planner.num_decisions.items():
        decisions.add_metric([str(kind)], count)
    predicted = CounterMetricFamily(
        "kvkeep_planner_predicted_seconds", "What plans that are finished were to take."
    )
    predicted.add_metric([], planner.predicted_s)
    actual = CounterMetricFamily("kvkeep_planner_actual_seconds", "What they took.")
    actual.add_metric([], planner.actual_s)
    return [decisions, predicted, actual]
