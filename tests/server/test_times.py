"""What a client and a scrape are told of times: the queue, slow tiers, and what reuse has saved."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvkeep.testing.faulty_tier import Fault
from tests.faulty_settings import FaultyHost
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

DELAY_S = 0.2
PROMPT = "amber river: 4821\nsilver fox: 1177\n" * 12
EVERYWHERE = {"all": True, "tiers": ["device"]}


@pytest.fixture(scope="module")
def slow() -> FaultyHost:
    """Memory below the device that answers late."""
    return FaultyHost(faults=(Fault("delay", "get", probability=1, delay_s=DELAY_S),))


@pytest.fixture(scope="module")
def server(slow: FaultyHost) -> Iterator[RunningServer]:
    """A server over it that loads whatever it has."""
    with running_server(tiers=[slow], llm_options={"loading": "always"}) as running:
        yield running


def complete(client: httpx.Client, prompt: str = PROMPT, **options: Any) -> httpx.Response:
    """A short completion whose answer says what it cost."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "kv_cache": {"explain": True}}
    response = client.post("/v1/completions", json=body | options)
    response.raise_for_status()
    return response


def empty_device(client: httpx.Client, slow: FaultyHost, num_tokens: int) -> None:
    """All full blocks of a prompt lie in the tier, and nothing on the device."""
    (tier,) = slow.opened
    wait_until(lambda: tier.stats().num_objects >= num_tokens // 32, "blocks have gone down")
    client.post("/v1/cache/purge", json=EVERYWHERE).raise_for_status()


def scrape(client: httpx.Client) -> dict[str, float]:
    """Sums and counts of families without labels."""
    families = parse_text(client.get("/metrics").text)
    return {one.name: one.value for family in families for one in family.samples if not one.labels}


def timings(response: httpx.Response) -> dict[str, float]:
    """The header Server-Timing, in milliseconds."""
    parts = (part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    return {name: float(duration) for name, duration in parts}


def test_time_in_a_slow_tier_is_told_and_counted(server: RunningServer, slow: FaultyHost) -> None:
    """The report, the header and the metrics have it, and say what was saved all the same."""
    with server.client() as client:
        cold = complete(client)
        num_prompt = cold.json()["usage"]["prompt_tokens"]
        empty_device(client, slow, num_prompt)
        before = scrape(client)
        restored = complete(client)
        after = scrape(client)

    report, header = restored.json()["kv_cache"], timings(restored)
    assert report["tiers"]["host"] == num_prompt // 32 * 32
    assert report["restore_ms"] >= DELAY_S * 1e3
    assert report["queue_ms"] >= report["restore_ms"]
    assert report["saved_ms_est"] > 0
    assert cold.json()["kv_cache"]["restore_ms"] == 0
    assert list(header) == ["queue", "restore", "prefill", "first_token", "total"]
    assert header["restore"] == report["restore_ms"]
    assert header["queue"] + header["prefill"] == pytest.approx(header["first_token"], abs=0.2)
    assert "restore" not in timings(cold)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["kvkeep_restore_seconds_count"] == 1
    assert grown["kvkeep_restore_seconds_sum"] == pytest.approx(
        report["restore_ms"] / 1e3, abs=1e-3
    )
    assert grown["kvkeep_saved_seconds_total"] == pytest.approx(
        report["saved_ms_est"] / 1e3, abs=1e-3
    )


def test_a_request_is_in_the_queue_and_then_computed(server: RunningServer) -> None:
    """For every request all parts add up to its time; without a tier nothing is restored."""
    with server.client() as client:
        before = scrape(client)
        for number in range(3):
            complete(client, f"{number} new words, and no others. " * 10)
        after = scrape(client)

    grown = {name: after[name] - before[name] for name in after}
    for name in ("queue", "prefill"):
        assert grown[f"kvkeep_{name}_seconds_count"] == 3
    for name in ("queue", "prefill", "decode"):
        assert grown[f"kvkeep_{name}_seconds_sum"] > 0
    parts = sum(grown[f"kvkeep_{name}_seconds_sum"] for name in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(grown["kvkeep_request_seconds_sum"], rel=0.01)
    assert grown["kvkeep_restore_seconds_count"] == 0
