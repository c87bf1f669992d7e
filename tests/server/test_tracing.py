"""A span of OpenTelemetry for every request, with the attributes that its conventions name."""

import asyncio
import sys
from dataclasses import replace

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from starlette.types import Receive, Scope, Send

from kvkeep.cache import Receipt
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine import FinishReason
from kvkeep.errors import ConfigError
from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.jobs import Finished, Job
from kvkeep.server.tracing import RequestTraces, TraceParents, open_provider
from tests.running_server import RunningServer
from tests.servers import wait_until

JOB = Job(
    prompt_ids=[1, 2, 3],
    params=SamplingParams(max_tokens=7, temperature=0.5, seed=3),
    options=CacheOptions(session="user-42"),
    tenant=Tenant(TenantId("local"), None, is_admin=True),
    request_id="req-1",
    route="/v1/chat/completions",
)
FINISHED = Finished(
    job=JOB,
    receipt=Receipt(
        prompt_tokens=100,
        reused_tokens=90,
        computed_tokens=10,
        output_tokens=5,
        tokens_by_source={"device": 60, "disk": 30, "computed": 10},
        num_preemptions=1,
    ),
    finish_reasons=(FinishReason.STOP,),
    started_at=1_800_000_000.0,
    waited_s=0.25,
    token_gaps_s=(),
    total_s=1.5,
)


class Traces:
    """Traces whose spans are kept in memory."""

    def __init__(self) -> None:
        self._kept = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._kept))
        self.observer = RequestTraces(provider, model_id="tiny", version="1")

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """All spans that have ended."""
        return self._kept.get_finished_spans()


@pytest.fixture
def traces() -> Traces:
    """Traces without a span."""
    return Traces()


def test_a_span_says_what_a_request_asked_and_what_it_cost(traces: Traces) -> None:
    """Begin and end are those of the request, to the microsecond; the first token is an event."""
    traces.observer(FINISHED)
    (span,) = traces.spans

    assert span.name == "chat tiny"
    assert span.kind is SpanKind.SERVER
    assert span.start_time == 1_800_000_000_000_000_000
    assert span.end_time == 1_800_000_001_500_000_000
    assert [(one.name, one.timestamp) for one in span.events] == [
        ("first token", 1_800_000_000_250_000_000)
    ]
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kvkeep",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.seed": 3,
        "gen_ai.conversation.id": "user-42",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 90,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.25,
        "http.route": "/v1/chat/completions",
        "kvkeep.request.id": "req-1",
        "kvkeep.tenant.id": "local",
        "kvkeep.usage.device.input_tokens": 60,
        "kvkeep.usage.disk.input_tokens": 30,
        "kvkeep.usage.computed.input_tokens": 10,
        "kvkeep.usage.recomputed_tokens": 0,
        "kvkeep.num_preemptions": 1,
    }


def test_failures_and_clients_that_left_are_told_apart(traces: Traces) -> None:
    """Only the first is an error of ours; the second has no receipt, and still a span."""
    traces.observer(replace(FINISHED, finish_reasons=(FinishReason.ERROR,), waited_s=None))
    plain = replace(JOB, route="/v1/completions", options=CacheOptions())
    traces.observer(replace(FINISHED, job=plain, receipt=None, finish_reasons=()))
    failed, left = traces.spans

    assert failed.status.status_code is StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "model_error"
    assert failed.events == ()
    assert left.name == "text_completion tiny"
    assert left.status.status_code is StatusCode.UNSET
    assert (left.attributes or {})["gen_ai.response.finish_reasons"] == ("abort",)
    assert "gen_ai.usage.input_tokens" not in (left.attributes or {})
    assert "gen_ai.conversation.id" not in (left.attributes or {})


@pytest.mark.parametrize(
    ("header", "trace_id"),
    [
        (
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "0af7651916cd43dd8448eb211c80319c",
        ),
        ("00-nonsense", None),
        (None, None),
    ],
)
def test_a_span_belongs_to_the_trace_of_its_caller(
    traces: Traces, header: str | None, trace_id: str | None
) -> None:
    """What the header names is the parent; without a valid one the span begins a trace."""

    async def serve(_scope: Scope, _receive: Receive, send: Send) -> None:
        traces.observer(FINISHED)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask() -> None:
        transport = httpx.ASGITransport(app=TraceParents(serve))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/", headers={} if header is None else {"traceparent": header})
        # Nothing of it is left for what comes after.
        traces.observer(FINISHED)

    asyncio.run(ask())
    span, later = traces.spans
    assert span.context is not None
    assert later.parent is None
    if trace_id is None:
        assert span.parent is None
    else:
        assert format(span.context.trace_id, "032x") == trace_id
        assert span.parent is not None
        assert format(span.parent.span_id, "016x") == "b7ad6b7169203331"


def test_requests_over_http_leave_spans_without_text(server: RunningServer, traces: Traces) -> None:
    """As an observer of a service; neither prompt nor answer is in any attribute."""
    server.service.observers.append(traces.observer)
    messages = [{"role": "user", "content": "What is the magic number of saffron?"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 5, "temperature": 0}
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body).json()
    wait_until(lambda: traces.spans, "the span has ended")
    server.service.observers.remove(traces.observer)
    (span,) = traces.spans
    attributes = dict(span.attributes or {})

    assert span.name == "chat tiny"
    assert attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert attributes["gen_ai.request.max_tokens"] == 5
    text = answer["choices"][0]["message"]["content"].strip()
    assert text
    for value in attributes.values():
        assert "saffron" not in str(value)
        assert text not in str(value)


def test_an_address_that_is_none_is_refused() -> None:
    """The error says how to write it."""
    with pytest.raises(
        ConfigError, match="otlp_endpoint='localhost:4318' is no address; write http"
    ):
        open_provider("localhost:4318")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is absent can be installed by name."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)

    with pytest.raises(ConfigError, match=r"pip install 'kvkeep\[otel\]'"):
        open_provider("http://localhost:4318")
