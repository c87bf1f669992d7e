"""A span of OpenTelemetry for every request, made when it has ended.

The only importer of opentelemetry, which is optional. Names of attributes: its semantic conventions for
generative AI, "Generative AI spans", and kvkeep.* for what they have no name for. Spans never hold text.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from kvkeep.cache import Receipt
from kvkeep.engine import FinishReason
from kvkeep.errors import ConfigError
from kvkeep.server.service import Finished, Job

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["RequestTraces", "TraceParents", "open_provider"]

_NS = 1_000_000_000
_PROVIDER = "kvkeep"
_FLUSH_MS = 5_000


def open_provider(endpoint: str, *, service_name: str = _PROVIDER) -> "TracerProvider":
    """What sends spans to a collector at `endpoint`, "http://localhost:4318" for instance.

    Sampling and headers are set by the variables that all programs with OpenTelemetry know, OTEL_*. Raises
    ConfigError where the extra is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"otlp_endpoint={endpoint!r} is no address; write http://host:4318, or https"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found, unused-ignore]
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint={endpoint!r} needs a library that is absent ({error}); "
            "run pip install 'kvkeep[otel]', or leave it out"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class RequestTraces:
    """Makes a span of every job that has ended: an observer of a Service.

    Spans are children of the caller's where TraceParents is among the app's middleware.
    """

    def __init__(self, provider: "TracerProvider", *, model_id: str, version: str) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode

        self._provider = provider
        self._model_id = model_id
        self._tracer = provider.get_tracer("kvkeep", version)
        self._kind = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR, "the model failed")

    def __call__(self, finished: Finished) -> None:
        """Make the span of a job; call it in the task that has served it."""
        job, receipt = finished.job, finished.receipt
        name = "text_completion" if job.route.endswith("/v1/completions") else "chat"
        start_ns = int(finished.started_at * _NS)
        span = self._tracer.start_span(
            f"{name} {self._model_id}",
            kind=self._kind,
            start_time=start_ns,
            attributes={
                "gen_ai.operation.name": name,
                "gen_ai.provider.name": _PROVIDER,
                "gen_ai.request.model": self._model_id,
                "gen_ai.response.model": self._model_id,
                **_request_attributes(job),
                **({} if receipt is None else _usage_attributes(receipt)),
                **_outcome_attributes(finished.finish_reasons),
            },
        )
        if finished.waited_s is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", finished.waited_s)
            span.add_event("first token", timestamp=start_ns + int(finished.waited_s * _NS))
        if FinishReason.ERROR in finished.finish_reasons:
            span.set_attribute("error.type", "model_error")
            span.set_status(self._failed)
        span.end(end_time=start_ns + int(finished.total_s * _NS))

    def close(self) -> None:
        """Send what is left; waits for it a few seconds at the most."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()


class TraceParents:
    """ASGI middleware: what a request causes belongs to the trace that its header `traceparent` names."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._context = context
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request in the context of its caller."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        token = self._context.attach(self._propagator.extract(headers))
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.detach(token)


def _request_attributes(job: Job) -> Mapping[str, Any]:
    params, options = job.params, job.options
    attributes: dict[str, Any] = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": float(params.temperature),
        "gen_ai.request.top_p": float(params.top_p),
        "gen_ai.request.choice.count": params.n,
        "http.route": job.route,
        "kvkeep.request.id": job.request_id,
        "kvkeep.tenant.id": job.tenant.tenant_id,
    }
    if params.seed is not None:
        attributes["gen_ai.request.seed"] = params.seed
    if options.session is not None:
        attributes["gen_ai.conversation.id"] = options.session
    return attributes


def _usage_attributes(receipt: Receipt) -> Mapping[str, Any]:
    return {
        "gen_ai.usage.input_tokens": receipt.prompt_tokens,
        "gen_ai.usage.output_tokens": receipt.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": receipt.reused_tokens,
        "kvkeep.usage.recomputed_tokens": receipt.recomputed_tokens,
        "kvkeep.num_preemptions": receipt.num_preemptions,
        **{
            f"kvkeep.usage.{source}.input_tokens": num_tokens
            for source, num_tokens in receipt.tokens_by_source.items()
        },
    }


def _outcome_attributes(reasons: Sequence[FinishReason]) -> Mapping[str, Any]:
    # A client that leaves before the end takes the reasons with it.
    return {"gen_ai.response.finish_reasons": [str(one) for one in reasons] or ["abort"]}
