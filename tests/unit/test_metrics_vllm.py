"""The names of vLLM: made of what we count, with its meanings."""

from prometheus_client.parser import text_string_to_metric_families

from kvkeep.cache import Receipt
from kvkeep.metrics import Metrics, Snapshot, Times
from tests.cache_stats import STATS

LABELS = {"model_name": "toy", "engine": "0"}
SNAPSHOT = Snapshot(
    cache=STATS,
    is_healthy=True,
    num_running=2,
    num_waiting=3,
    facts={"block_size": "32", "num_blocks": "20"},
)
# What boards and routers made for vLLM look for.
EXPECTED_NAMES = {
    "cache_config",
    "e2e_request_latency_seconds",
    "external_prefix_cache_hits",
    "external_prefix_cache_queries",
    "generation_tokens",
    "inter_token_latency_seconds",
    "kv_cache_usage_perc",
    "num_preemptions",
    "num_requests_running",
    "num_requests_waiting",
    "prefix_cache_hits",
    "prefix_cache_queries",
    "prompt_tokens",
    "prompt_tokens_by_source",
    "prompt_tokens_cached",
    "prompt_tokens_recomputed",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_success",
    "request_time_per_output_token_seconds",
    "time_to_first_token_seconds",
}


def receipt(device: int, disk: int, computed: int) -> Receipt:
    """A request whose prompt came from these places."""
    return Receipt(
        prompt_tokens=device + disk + computed,
        reused_tokens=device + disk,
        computed_tokens=computed,
        output_tokens=5,
        tokens_by_source={"device": device, "disk": disk, "computed": computed},
    )


def samples(compat: str | None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """What a scrape shows of vLLM's names after two requests, a miss and a hit of both kinds."""
    metrics = Metrics(model="toy", version="1", compat=compat)
    times = Times(total_s=0.7, first_token_s=0.3)
    metrics.requests.observe(receipt(0, 0, 50), "length", times, reuse="miss")
    metrics.requests.observe(receipt(60, 30, 10), "stop", times, reuse="hit")
    text = metrics.render(SNAPSHOT).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }


def value(name: str, **labels: str) -> float | None:
    """One sample with the labels that all have."""
    return samples("vllm").get((f"vllm:{name}", frozenset((LABELS | labels).items())))


def test_they_are_there_only_when_asked_for() -> None:
    """Every name that others look for is exported, each once."""
    assert samples(None) == {}

    metrics = Metrics(model="toy", version="1", compat="vllm")
    text = metrics.render(SNAPSHOT).decode()
    names = [
        line.split()[2].removeprefix("vllm:").removesuffix("_total").removesuffix("_info")
        for line in text.splitlines()
        if line.startswith("# TYPE vllm:")
    ]
    assert len(names) == len(set(names))
    assert set(names) == EXPECTED_NAMES


def test_tokens_mean_what_they_mean_there() -> None:
    """The device is asked for the whole prompt, the tiers for what it has not."""
    assert value("prefix_cache_queries_total") == 150
    assert value("prefix_cache_hits_total") == 60
    assert value("external_prefix_cache_queries_total") == 90
    assert value("external_prefix_cache_hits_total") == 30
    assert value("prompt_tokens_total") == 150
    assert value("prompt_tokens_cached_total") == 90
    assert value("prompt_tokens_by_source_total", source="local_compute") == 60
    assert value("prompt_tokens_by_source_total", source="local_cache_hit") == 60
    assert value("prompt_tokens_by_source_total", source="external_kv_transfer") == 30
    assert value("generation_tokens_total") == 10


def test_requests_and_the_queue_are_there() -> None:
    """Reasons keep their own series; the share of the device is what running requests hold."""
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("request_success_total", finished_reason="length") == 1
    assert value("num_requests_running") == 2
    assert value("num_requests_waiting") == 3
    assert value("kv_cache_usage_perc") == 0.25
    assert value("cache_config_info", block_size="32", num_gpu_blocks="20") == 1


def test_histograms_are_summed_over_labels_that_are_not_theirs() -> None:
    """First tokens of hits and of misses are one histogram, whose buckets stay cumulative."""
    assert value("time_to_first_token_seconds_count") == 2
    assert value("time_to_first_token_seconds_sum") == 0.6
    assert value("time_to_first_token_seconds_bucket", le="0.25") == 0
    assert value("time_to_first_token_seconds_bucket", le="0.5") == 2
    assert value("time_to_first_token_seconds_bucket", le="+Inf") == 2
