"""Spans of a server as a collector gets them: over real HTTP, in OTLP's protobuf."""

import gzip
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any, cast

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

from tests.running_server import RunningServer, running_server
from tests.servers import wait_until

_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
_PARENT = {"traceparent": f"00-{_TRACE_ID}-b7ad6b7169203331-01"}
_BODY = {"model": "tiny", "prompt": "amber river and silver fox", "max_tokens": 3, "temperature": 0}


@dataclass
class Collector:
    """What listens for traces; while `is_down` is set it refuses them."""

    port: int = 0
    is_down: Event = field(default_factory=Event)
    paths: set[str] = field(default_factory=set)
    batches: list[ResourceSpans] = field(default_factory=list)

    @property
    def spans(self) -> list[Span]:
        """All spans that came."""
        return [
            span for batch in self.batches for scope in batch.scope_spans for span in scope.spans
        ]

    def take(self, path: str, body: bytes) -> None:
        """Read one request."""
        self.paths.add(path)
        self.batches += ExportTraceServiceRequest.FromString(body).resource_spans


class _Receiver(BaseHTTPRequestHandler):
    """Hands what it gets to the collector that its server has."""

    def do_POST(self) -> None:
        collector = cast("Any", self.server).collector
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        if not collector.is_down.is_set():
            collector.take(self.path, body)
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(400 if collector.is_down.is_set() else 200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """One on a free port of the loopback address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Receiver) as http:
        found = Collector(port=http.server_address[1])
        http.collector = found  # type: ignore[attr-defined]
        thread = Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield found
        http.shutdown()
        thread.join()


def _served(collector: Collector) -> AbstractContextManager[RunningServer]:
    return running_server(otlp_endpoint=f"http://127.0.0.1:{collector.port}/")


def _complete(server: RunningServer, **options: Any) -> dict[str, Any]:
    with server.client() as client:
        response = client.post("/v1/completions", json=_BODY | options, headers=_PARENT)
    assert response.status_code == 200
    answer: dict[str, Any] = response.json()
    return answer


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        kind = pair.value.WhichOneof("value")
        assert kind is not None
        found[pair.key] = getattr(pair.value, kind)
    return found


def test_a_collector_gets_a_span_for_every_request(collector: Collector) -> None:
    """At the path that OTLP names, as child of the caller's span, by the end of the server at the latest."""
    with _served(collector) as server:
        usage = _complete(server)["usage"]
        _complete(server)

    assert collector.paths == {"/v1/traces"}
    resource = _attributes(collector.batches[0].resource.attributes)
    assert resource["service.name"] == "kvkeep"
    first, second = collector.spans
    assert {span.trace_id.hex() for span in collector.spans} == {_TRACE_ID}
    assert first.parent_span_id.hex() == "b7ad6b7169203331"
    assert first.name == "text_completion tiny"
    assert first.kind == Span.SPAN_KIND_SERVER
    assert 0 < first.end_time_unix_nano - first.start_time_unix_nano < 60e9
    assert [event.name for event in first.events] == ["first token"]
    attributes = _attributes(first.attributes)
    assert attributes["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert attributes["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 3
    assert attributes["http.route"] == "/v1/completions"
    assert attributes["kvkeep.request.id"] != _attributes(second.attributes)["kvkeep.request.id"]
    assert "amber" not in str(collector.batches)


def test_a_collector_that_fails_hurts_no_request(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """What it refuses is lost, with a line in the log; the server answers, and ends as soon."""
    collector.is_down.set()
    with _served(collector) as server:
        assert _complete(server)["usage"]["completion_tokens"] == 3

    assert collector.spans == []
    wait_until(lambda: "Failed to export" in caplog.text, "a line in the log", 5.0)
