"""/metrics over HTTP: what clients have asked for is what it shows."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from threading import Event
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvkeep.cache import Receipt
from kvkeep.cache.explain import Miss, MissType
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.llm import LLM
from kvkeep.metrics import Metrics, Snapshot
from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.jobs import Finished, Job
from kvkeep.server.metrics_routes import ResponseCounter, count_jobs
from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
EMPTY = Snapshot(is_healthy=True, num_running=0, num_waiting=0, cache=None)
KEY, ADMIN_KEY = "a-key-of-a-client", "the-key-of-the-admin"
FINISHED = Finished(
    job=Job(
        prompt_ids=[1],
        params=SamplingParams(),
        options=CacheOptions(),
        tenant=Tenant(TenantId("local"), None, is_admin=True),
        request_id="req-1",
    ),
    receipt=Receipt(
        prompt_tokens=100,
        reused_tokens=0,
        computed_tokens=100,
        output_tokens=5,
        miss=Miss(type=MissType.EVICTED, missed_tokens=64),
    ),
    finish_reasons=(FinishReason.STOP,),
    started_at=1_800_000_000.0,
    waited_s=0.25,
    token_gaps_s=(0.5,),
    total_s=1.5,
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server with a tier and the names of vLLM."""
    with running_server(tiers=["host:16MB"], metrics_compat="vllm") as running:
        yield running


def scrape(client: httpx.Client) -> Samples:
    """All samples as of now."""
    response = client.get("/metrics")
    assert response.status_code == 200
    return parsed(response.text)


def parsed(text: str) -> Samples:
    """All samples of a scrape."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample, 0 where there is none yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def grown(before: Samples, after: Samples, name: str, **labels: str) -> float:
    """By how much a counter has grown."""
    return value(after, name, **labels) - value(before, name, **labels)


def complete(client: httpx.Client, prompt: str, **options: Any) -> dict[str, Any]:
    """A short completion that always says the same."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0} | options
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_tokens_by_source_are_those_of_the_usage(server: RunningServer) -> None:
    """Asked twice, the second prompt comes from the device but for its end, and is a hit."""
    prompt = "amber river: 4821\nsilver fox: 1177\n" * 12
    with server.client() as client:
        before = scrape(client)
        first = complete(client, prompt)["usage"]
        between = scrape(client)
        second = complete(client, prompt)["usage"]
        after = scrape(client)

    name = "kvkeep_prompt_tokens_total"
    assert grown(before, between, name, source="computed") == first["prompt_tokens"]
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert grown(between, after, name, source="device") == cached
    assert grown(between, after, name, source="computed") == second["prompt_tokens"] - cached
    assert grown(before, after, "kvkeep_requests_total", finish_reason="length") == 2
    assert grown(before, after, "kvkeep_output_tokens_total") == 8
    assert grown(before, after, "kvkeep_inter_token_seconds_count") == 6
    times = "kvkeep_time_to_first_token_seconds_count"
    assert grown(before, between, times, reuse="miss") == 1
    assert grown(between, after, times, reuse="hit") == 1
    assert grown(before, after, "kvkeep_request_seconds_sum") > 0


def test_the_cache_and_its_tiers_are_shown_as_they_are_now(server: RunningServer) -> None:
    """Every place has its bytes, and the settings are there in words."""
    with server.client() as client:
        complete(client, "copper lantern: 2718\n" * 10)
        samples = scrape(client)

    for tier in ("device", "host"):
        states = [
            value(samples, "kvkeep_bytes", tier=tier, state=s) for s in ("in_use", "reusable")
        ]
        free = value(samples, "kvkeep_bytes", tier=tier, state="free")
        assert sum(states) + free == value(samples, "kvkeep_capacity_bytes", tier=tier)
    assert value(samples, "kvkeep_bytes", tier="device", state="reusable") > 0
    assert value(samples, "kvkeep_healthy") == 1
    (facts,) = [dict(labels) for name, labels in samples if name == "kvkeep_cache_info"]
    assert facts["model"] == "tiny"
    assert facts["block_size"] == "32"
    assert int(facts["num_blocks"]) > 0
    version = httpx.get(f"{server.url}/version").json()["version"]
    assert value(samples, "kvkeep_build_info", version=version) == 1


def test_purges_are_counted_by_why(server: RunningServer) -> None:
    """What was purged is gone for that reason."""
    with server.client() as client:
        complete(client, "ivory candle: 3141\n" * 16, kv_cache={"tags": ["doc:7"]})
        before = scrape(client)
        purged = client.post("/v1/cache/purge", json={"tags": ["doc:7"]}).json()
        after = scrape(client)

    assert purged["deleted"] > 0
    removed = grown(before, after, "kvkeep_removed_blocks_total", reason="invalidated")
    assert removed == purged["deleted"]


def test_sessions_and_pins_are_counted(server: RunningServer) -> None:
    """As many as there are now: pinned is what the pinned prompt has of full blocks."""
    prompt = "scarlet harbor: 2020\n" * 20
    with server.client() as client:
        before = scrape(client)
        for session in ("one", "two"):
            usage = complete(client, prompt, kv_cache={"session": session, "pin": True})["usage"]
        after = scrape(client)

    assert grown(before, after, "kvkeep_sessions") == 2
    assert grown(before, after, "kvkeep_pinned_blocks") == usage["prompt_tokens"] // 32


def test_misses_are_counted_by_why(server: RunningServer) -> None:
    """Of requests that asked why; without a receipt nothing but the abort is known."""
    metrics = Metrics(model="tiny", version="1")
    count_jobs(server.service, metrics, FINISHED)
    count_jobs(server.service, metrics, replace(FINISHED, receipt=None, finish_reasons=()))
    samples = parsed(metrics.render(EMPTY).decode())

    assert value(samples, "kvkeep_misses_total", reason="evicted") == 1
    assert value(samples, "kvkeep_requests_total", finish_reason="stop") == 1
    assert value(samples, "kvkeep_requests_total", finish_reason="abort") == 1
    assert value(samples, "kvkeep_time_to_first_token_seconds_sum", reuse="miss") == 0.25
    assert value(samples, "kvkeep_inter_token_seconds_sum") == 0.5


def test_what_a_request_waited_before_it_came_to_the_engine_is_time_in_the_queue(
    server: RunningServer,
) -> None:
    """A step that is under way when it arrives is no part of computing it."""
    assert FINISHED.receipt is not None
    receipt = replace(FINISHED.receipt, queue_s=0.03125, first_token_s=0.125, restore_s=0.0625)
    metrics = Metrics(model="tiny", version="1")
    count_jobs(server.service, metrics, replace(FINISHED, receipt=receipt))
    samples = parsed(metrics.render(EMPTY).decode())

    assert value(samples, "kvkeep_queue_seconds_sum") == 0.15625
    assert value(samples, "kvkeep_prefill_seconds_sum") == 0.09375
    assert value(samples, "kvkeep_restore_seconds_sum") == 0.0625


def test_a_client_that_leaves_is_an_aborted_request(server: RunningServer) -> None:
    """Also when its stream has just begun."""
    body = {"model": "tiny", "prompt": "one", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.client() as client:
        before = scrape(client)
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())

        def has_ended() -> bool:
            now = scrape(client)
            return grown(before, now, "kvkeep_requests_total", finish_reason="abort") == 1

        wait_until(has_ended, "the request counts as aborted")
        assert value(scrape(client), "kvkeep_requests_running") == 0


def test_answers_are_counted_by_route_and_status() -> None:
    """The label is the pattern of the route; what is no route shares one, whatever clients think of."""
    app, router = FastAPI(), APIRouter()
    app.state.metrics = metrics = Metrics(model="tiny", version="1")

    @router.get("/things/{name}")
    async def thing(name: str) -> str:
        if name == "absent":
            raise HTTPException(404)
        return name

    app.include_router(router)
    app.add_middleware(ResponseCounter)

    async def ask() -> None:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for path in ("/things/one", "/things/two", "/things/absent", "/no/such", "/path"):
                await client.get(path)

    asyncio.run(ask())
    samples = parsed(metrics.render(EMPTY).decode())
    found = {
        (dict(labels)["route"], dict(labels)["status"]): count
        for (name, labels), count in samples.items()
        if name == "kvkeep_http_responses_total"
    }

    assert found == {
        ("/things/{name}", "200"): 2,
        ("/things/{name}", "404"): 1,
        ("other", "404"): 2,
    }


def test_a_server_counts_what_it_refuses_too(server: RunningServer) -> None:
    """Requests that are malformed have their route, those for nothing have none."""
    name = "kvkeep_http_responses_total"
    with server.client() as client:
        before = scrape(client)
        client.get("/no/such/path")
        client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": "many"})
        after = scrape(client)

    assert grown(before, after, name, route="other", status="404") == 1
    assert grown(before, after, name, route="/v1/completions", status="400") == 1
    assert grown(before, after, name, route="/metrics", status="200") == 1


def test_every_scraper_can_read_it(server: RunningServer) -> None:
    """Also one that would rather have another format, as Prometheus itself; names stay as they are."""
    accept = (
        "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.5,text/plain;q=0.2"
    )
    with server.client() as client:
        response = client.get("/metrics", headers={"accept": accept})

    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    names = {family.name for family in parse_text(response.text)}
    assert {"kvkeep_requests", "kvkeep_bytes", "vllm:kv_cache_usage_perc"} <= names


def test_names_of_vllm_are_there_where_they_were_asked_for(server: RunningServer) -> None:
    """They say the same as ours."""
    with server.client() as client:
        complete(client, "a")
        samples = scrape(client)

    labels = {"model_name": "tiny", "engine": "0"}
    ours = value(samples, "kvkeep_output_tokens_total")
    assert ours > 0
    assert value(samples, "vllm:generation_tokens_total", **labels) == ours


def test_a_key_guards_metrics_unless_they_are_open() -> None:
    """With keys, /metrics wants one as well; `open_metrics` lets scrapers in without."""
    llm = LLM("tiny", capacity="32MB")
    with running_server(llm, api_keys=[KEY], admin_key=ADMIN_KEY) as guarded:
        assert httpx.get(f"{guarded.url}/metrics").status_code == 401
        with guarded.client(ADMIN_KEY) as client:
            assert value(scrape(client), "kvkeep_healthy") == 1
    llm = LLM("tiny", capacity="32MB")
    with running_server(llm, api_keys=[KEY], open_metrics=True) as opened:
        response = httpx.get(f"{opened.url}/metrics")
        assert response.status_code == 200
        assert "vllm:" not in response.text


def test_a_server_that_is_loading_has_metrics_already() -> None:
    """They say that it is not healthy yet, and nothing of a cache."""
    is_allowed = Event()

    def load() -> LLM:
        assert is_allowed.wait(30)
        return LLM("tiny", capacity="32MB")

    with running_server(load) as loading, loading.client() as client:
        try:
            samples = scrape(client)
        finally:
            is_allowed.set()
        assert samples["kvkeep_healthy", frozenset()] == 0
        assert not any(name == "kvkeep_bytes" for name, _ in samples)
        wait_until(lambda: value(scrape(client), "kvkeep_healthy"), "the model is loaded")
