"""The web application: routes of every protocol behind one gate."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from kvkeep import __version__
from kvkeep.server import (
    anthropic_routes,
    basic_routes,
    cache_routes,
    metrics_routes,
    openai_routes,
    responses_routes,
)
from kvkeep.server.auth import Gate
from kvkeep.server.errors import add_error_routes
from kvkeep.server.lifespan import lifespan_of
from kvkeep.server.metrics_routes import ResponseCounter
from kvkeep.server.middleware import Gatekeeper, RequestIds, WholeBody
from kvkeep.server.server_secret import read_secret
from kvkeep.server.service import Service
from kvkeep.server.tracing import TraceParents

__all__ = ["create_app"]

_READABLE_HEADERS = ("x-request-id", "x-kv-cache", "x-kv-warnings", "server-timing", "retry-after")


def create_app(service: Service) -> FastAPI:
    """The routes over `service`, which starts and closes with the app.

    In routes: `Serving` is the service, `Asker` who asks, `Admin` the same where only an administrator may,
    `request_id_of(request)` the id. Everything raised becomes a body in the shape of the route's protocol.
    """
    settings = service.settings
    app = FastAPI(
        title="kvkeep",
        version=__version__,
        lifespan=lifespan_of(service),
        # Their pages load scripts from elsewhere; the document itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.gate = gate = Gate(settings, read_secret(settings.secret_file))
    # They are looked through in this order for every request.
    for module in (
        openai_routes,
        anthropic_routes,
        responses_routes,
        basic_routes,
        cache_routes,
        metrics_routes,
    ):
        app.include_router(module.routes())
    add_error_routes(app)
    # The last one added comes first.
    app.add_middleware(
        WholeBody, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(Gatekeeper, gate=gate, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=list(_READABLE_HEADERS),
        )
    app.add_middleware(ResponseCounter)
    if settings.otlp_endpoint is not None:
        app.add_middleware(TraceParents)
    app.add_middleware(RequestIds)
    return app
