"""Metrics: what receipts and reports say is what a scrape shows, in both text formats."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from threading import Thread

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvkeep.cache import GroupStats, Receipt, TierReport
from kvkeep.engine import FinishReason
from kvkeep.metrics import Metrics, Snapshot, Times, reuse_class
from kvkeep.metrics.instruments import Counter, Histogram
from kvkeep.planning import PlannerStats
from kvkeep.tiers.base import TierStats
from tests import cache_stats

RECEIPT = Receipt(
    prompt_tokens=100,
    reused_tokens=90,
    computed_tokens=10,
    output_tokens=5,
    tokens_by_source={"device": 60, "disk": 30, "computed": 10},
    recomputed_tokens=3,
    num_preemptions=1,
)
TIMES = Times(total_s=0.7, first_token_s=0.3)
STATS = replace(
    cache_stats.STATS,
    groups=(
        GroupStats(
            name="full",
            layers=(0, 1),
            num_blocks=20,
            block_bytes=50,
            in_use=5,
            reusable=7,
            free=8,
            num_evictions=9,
        ),
    ),
    tiers=(
        TierReport(
            tier=TierStats(
                name="disk",
                capacity_bytes=5000,
                in_use_bytes=10,
                reusable_bytes=90,
                free_bytes=4900,
                num_objects=2,
                num_evictions=4,
                misses={"absent": 6},
                puts={"stored": 3, "refused": 1},
            ),
            num_loaded=11,
            loaded_bytes=550,
            load_seconds=0.5,
            load_failures={"corrupt": 2},
        ),
        TierReport(
            tier=TierStats(
                name="store",
                capacity_bytes=None,
                in_use_bytes=0,
                reusable_bytes=70,
                free_bytes=None,
                num_objects=1,
                num_evictions=0,
                misses={},
                puts={},
            ),
            num_loaded=0,
            loaded_bytes=0,
            load_seconds=0.0,
            load_failures={},
        ),
    ),
    planner=PlannerStats(
        num_decisions={"load": 4, "compute": 1},
        num_finished=4,
        predicted_s=1.0,
        actual_s=1.25,
        mean_error=0.2,
    ),
)
SNAPSHOT = Snapshot(
    is_healthy=True,
    num_running=2,
    num_waiting=3,
    cache=STATS,
    removed={"expired": 12},
    num_sessions=4,
    num_pinned=6,
    facts={"block_size": "32"},
)


def make_metrics(compat: str | None = None) -> Metrics:
    """Metrics of a server of the model "toy"."""
    return Metrics(model="toy", version="1.2.3", compat=compat)


class Scrape:
    """What a scrape shows, by sample name and labels."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = {family.name: family for family in families}
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of one sample, None where there is none."""
        return self.samples.get((name, frozenset(labels.items())))


def scrape(metrics: Metrics, snapshot: Snapshot = SNAPSHOT) -> Scrape:
    """A scrape as Prometheus makes it."""
    return Scrape(parse_text(metrics.render(snapshot).decode()))


def test_a_receipt_is_counted_whole() -> None:
    """Tokens by source add up to the prompt; what happened once is 1."""
    metrics = make_metrics()
    times = replace(TIMES, gaps_s=(0.15, 0.05, 0.15, 0.05), queue_s=0.1, restore_s=0.05, saved_s=2)
    metrics.requests.observe(RECEIPT, FinishReason.STOP, times, reuse="hit")
    shown = scrape(metrics)

    assert shown("kvkeep_requests_total", finish_reason="stop") == 1
    assert shown("kvkeep_requests_total", finish_reason="error") == 0
    by_source = {
        source: shown("kvkeep_prompt_tokens_total", source=source)
        for source in ("device", "disk", "computed")
    }
    assert by_source == {"device": 60, "disk": 30, "computed": 10}
    assert shown("kvkeep_output_tokens_total") == 5
    assert shown("kvkeep_recomputed_tokens_total") == 3
    assert shown("kvkeep_preemptions_total") == 1
    assert shown("kvkeep_saved_seconds_total") == 2.0
    assert shown("kvkeep_request_seconds_sum") == 0.7
    assert shown("kvkeep_queue_seconds_sum") == 0.1
    assert shown("kvkeep_prefill_seconds_sum") == pytest.approx(0.2)
    assert shown("kvkeep_decode_seconds_sum") == pytest.approx(0.4)
    assert shown("kvkeep_restore_seconds_sum") == 0.05
    assert shown("kvkeep_inter_token_seconds_bucket", le="0.05") == 2
    assert shown("kvkeep_inter_token_seconds_count") == 4
    assert shown("kvkeep_time_per_output_token_seconds_sum") == pytest.approx(0.1)
    assert shown("kvkeep_request_computed_tokens_bucket", le="8.0") == 0
    assert shown("kvkeep_request_computed_tokens_bucket", le="16.0") == 1


def test_what_is_not_known_is_not_counted() -> None:
    """No queue, no wait for tiers and no miss are shown where nobody said how long, or why."""
    metrics = make_metrics()
    metrics.requests.observe(RECEIPT, "stop", TIMES, reuse="hit")
    metrics.requests.observe(RECEIPT, "stop", TIMES, reuse="hit")
    metrics.requests.observe_miss("evicted")
    shown = scrape(metrics)

    assert shown("kvkeep_queue_seconds_count") == 0
    assert shown("kvkeep_prefill_seconds_count") == 0
    assert shown("kvkeep_restore_seconds_count") == 0
    assert shown("kvkeep_misses_total", reason="evicted") == 1
    assert shown("kvkeep_requests_total", finish_reason="stop") == 2


@pytest.mark.parametrize(
    ("reused", "computed", "expected"),
    [
        *[(0, 5, "miss"), (3, 9, "miss"), (30, 1, "miss"), (0, 500, "miss"), (1, 1210, "miss")],
        *[(31, 30, "miss"), (32, 30, "hit"), (31, 1, "hit"), (63, 1, "hit"), (64, 31, "hit")],
        *[(64, 0, "hit"), (32, 32, "partial"), (64, 32, "partial"), (92, 8, "partial")],
    ],
)
def test_first_tokens_are_timed_by_reuse(reused: int, computed: int, expected: str) -> None:
    """A hit is a prompt whose full blocks were all there, a miss one of which none was."""
    receipt = replace(
        RECEIPT, prompt_tokens=reused + computed, reused_tokens=reused, computed_tokens=computed
    )
    metrics = make_metrics()
    metrics.requests.observe(
        receipt, "stop", TIMES, reuse=reuse_class(reused + computed, reused, 32)
    )
    shown = scrape(metrics)

    counts = {
        reuse: shown("kvkeep_time_to_first_token_seconds_count", reuse=reuse)
        for reuse in ("hit", "partial", "miss")
    }
    assert counts == {"hit": 0, "partial": 0, "miss": 0} | {expected: 1}


def test_a_request_that_never_ran_says_nothing_about_reuse() -> None:
    """Ended before its first token, its prompt counts neither as reused nor as computed."""
    metrics = make_metrics()
    unborn, times = replace(RECEIPT, output_tokens=0), Times(total_s=0.2)
    metrics.requests.observe(unborn, FinishReason.ABORT, times, reuse="partial")
    metrics.requests.observe_lost()
    shown = scrape(metrics)
    assert shown("kvkeep_prompt_tokens_total", source="computed") == 0
    assert shown("kvkeep_requests_total", finish_reason="abort") == 2

    # A request that only warms the cache has no first token either, but is whole.
    metrics.requests.observe(unborn, FinishReason.LENGTH, times, reuse="partial")
    assert scrape(metrics)("kvkeep_prompt_tokens_total", source="computed") == 10


def test_a_scrape_shows_what_the_cache_reports() -> None:
    """Every place adds up to its capacity; what has no bound shows none."""
    shown = scrape(make_metrics(), replace(SNAPSHOT, is_healthy=False))

    for tier, capacity in (("device", 1000), ("disk", 5000)):
        states = [
            shown("kvkeep_bytes", tier=tier, state=state)
            for state in ("in_use", "reusable", "free")
        ]
        assert sum(value for value in states if value is not None) == capacity
        assert shown("kvkeep_capacity_bytes", tier=tier) == capacity
    assert shown("kvkeep_bytes", tier="store", state="reusable") == 70
    assert shown("kvkeep_bytes", tier="store", state="free") is None
    assert shown("kvkeep_capacity_bytes", tier="store") is None
    assert shown("kvkeep_device_usage_ratio") == 0.25
    assert shown("kvkeep_device_blocks", group="full", state="reusable") == 7
    assert shown("kvkeep_evictions_total", tier="device") == 9
    assert shown("kvkeep_evictions_total", tier="disk") == 4
    assert shown("kvkeep_removed_blocks_total", reason="expired") == 12
    assert shown("kvkeep_sessions") == 4
    assert shown("kvkeep_pinned_blocks") == 6
    assert shown("kvkeep_tier_objects", tier="disk") == 2
    assert shown("kvkeep_loaded_blocks_total", tier="disk") == 11
    assert shown("kvkeep_loaded_bytes_total", tier="disk") == 550
    assert shown("kvkeep_load_failures_total", tier="disk", cause="corrupt") == 2
    assert shown("kvkeep_tier_misses_total", tier="disk", cause="absent") == 6
    assert shown("kvkeep_tier_puts_total", tier="disk", outcome="refused") == 1
    assert shown("kvkeep_planner_decisions_total", kind="load") == 4
    assert shown("kvkeep_planner_actual_seconds_total") == 1.25
    assert shown("kvkeep_requests_running") == 2
    assert shown("kvkeep_requests_waiting") == 3
    assert shown("kvkeep_healthy") == 0
    assert shown("kvkeep_build_info", version="1.2.3") == 1
    assert shown("kvkeep_cache_info", model="toy", block_size="32") == 1


def test_a_server_without_a_model_shows_what_it_can() -> None:
    """While the model is loading there is no cache to ask, and yet an answer."""
    loading = Snapshot(is_healthy=False, num_running=0, num_waiting=0, cache=None)
    shown = scrape(make_metrics("vllm"), loading)

    assert shown("kvkeep_healthy") == 0
    assert "kvkeep_bytes" not in shown.families
    assert shown("kvkeep_cache_info", model="toy") == 1


def test_two_servers_in_one_process_count_apart() -> None:
    """There is no global registry."""
    first, second = make_metrics(), make_metrics()
    first.requests.observe(RECEIPT, "stop", TIMES, reuse="hit")

    assert scrape(second)("kvkeep_requests_total", finish_reason="stop") == 0
    names = {family.name for family in prometheus_client.REGISTRY.collect()}
    assert not any(name.startswith("kvkeep") for name in names)


@given(st.lists(st.lists(st.floats(min_value=0, max_value=20), max_size=8), max_size=5))
def test_histograms_count_as_prometheus_client_does(batches: list[list[float]]) -> None:
    """Values given at once make the samples that one at a time would have made."""
    bounds = [0.5, 1.0, 2.5, 10.0]
    ours = Histogram("h", "Ours.", bounds)
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("h", "Theirs.", registry=registry, buckets=bounds)
    for batch in batches:
        ours.observe(batch)
        for value in batch:
            theirs.observe(value)
    expected = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in theirs.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }

    actual = {(one.name, one.labels.get("le")): one.value for one in ours.collect().samples}
    assert actual == pytest.approx(expected)


def test_counts_of_many_threads_are_not_lost() -> None:
    """Every thread's increases are there in the end."""
    counter = Counter("c", "Counted.", ["by"])
    histogram = Histogram("h", "Counted.", [1.0])

    def count() -> None:
        for _ in range(2000):
            counter.add(1, "x")
            histogram.observe([0.5, 2.0])

    threads = [Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [one.value for one in counter.collect().samples] == [8000]
    assert [one.value for one in histogram.collect().samples][:2] == [8000, 16000]


def test_metrics_need_no_tensors() -> None:
    """Importing them loads no torch."""
    check = "import sys, kvkeep.metrics; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
