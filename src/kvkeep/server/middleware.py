"""What every request passes before its route: an id, the gate, and a body that is whole and not too big.

RequestIds, then the rules for pages of other origins, then Gatekeeper, WholeBody, and the route.
"""

import asyncio
import logging
from time import perf_counter
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvkeep.config.server import ServerSettings, is_loopback
from kvkeep.server.auth import Gate
from kvkeep.server.body_text import text_of
from kvkeep.server.errors import ApiError, api_error, error_response
from kvkeep.server.json_size import check_num_values

__all__ = ["Gatekeeper", "RequestIds", "WholeBody"]

_log = logging.getLogger("kvkeep.server.http")
_MAX_ID_CHARACTERS = 128
# Who is told to go away may send so much more, so that it gets to hear it; then the connection is closed.
_MAX_DISCARDED_BYTES = 256 * 2**20
_MAX_DIGITS = 20
# What is sent there is a file, whatever a client calls it.
_FILE_PATHS = ("/v1/cache/import",)
# Clients of this protocol look for the id under another name.
_ANTHROPIC = "/v1/messages"


class RequestIds:
    """Gives every request an id, its client's own if there is one, and answers what nobody else did."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        began_s = perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if scope["path"].startswith(_ANTHROPIC):
                    headers["request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001  the client gets an answer, the log the rest
            # The routes' own errors have been answered; what began cannot be taken back.
            _log.exception("%s %s failed", scope["method"], _written_path(scope))
            if not status:
                found = error_response(scope["path"], api_error(error), request_id)
                await found(scope, receive, send_with_id)
        finally:
            level = logging.INFO if status >= 400 else logging.DEBUG
            spent_ms = (perf_counter() - began_s) * 1000
            _log.log(
                level,
                "%s · %s %s · %d · %.0f ms",
                request_id, scope["method"], _written_path(scope), status, spent_ms,
            )  # fmt: skip


class Gatekeeper:
    """Lets in who has a key, and where no keys are set, only programs of this machine, not web pages."""

    def __init__(self, app: ASGIApp, *, gate: Gate, settings: ServerSettings) -> None:
        self._app = app
        self._gate = gate
        self._settings = settings
        self._open_paths = {"/health"} | ({"/metrics"} if settings.open_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if not self._settings.api_keys:
                self._refuse_strangers(headers)
            scope.setdefault("state", {})["tenant"] = self._gate.admit(headers)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refuse_strangers(self, headers: Headers) -> None:
        """A web page can make a browser on this machine ask us, under a name of its own or from its place."""
        host = headers.get("host", "localhost")  # a browser always sends it
        if not is_loopback(_host_name(host)):
            raise ApiError(
                403,
                f"host {host!r:.100} is not this machine; without API keys only localhost is served: set "
                "a key (--api-key)",
            )
        origin = headers.get("origin")
        allowed = self._settings.allowed_origins
        if "*" in allowed or origin in allowed:
            return
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(
                403, f"origin {origin!r:.100} may not call this server; see --allowed-origin"
            )
        # An image of a page, or a link, has no Origin; browsers say in this way where it is from.
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin"):
            raise ApiError(
                403, f"sec-fetch-site {site!r:.20}: pages of other origins may not call this server"
            )


class WholeBody:
    """Reads the body before anything else is done, within its bytes and its time."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                headers = Headers(scope=scope)
                body = await self._read(headers, receive)
            is_json = "json" in headers.get("content-type", "").lower()
            if body is not None and is_json and scope["path"] not in _FILE_PATHS:
                check_num_values(text_of(body))
        except TimeoutError:
            error = ApiError(
                408,
                f"the request was not whole after body_timeout_s={self._timeout_s:g}; send it faster",
                headers={"connection": "close"},
            )
            await _refuse(error, scope, receive, send)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; None when the client has left."""
        declared = headers.get("content-length", "")[:_MAX_DIGITS]
        if declared.isdigit() and int(declared) > self._max_bytes:
            raise self._too_big(int(declared))
        chunks: list[bytes] = []
        num_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if num_bytes > self._max_bytes:
                raise self._too_big(num_bytes)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_big(self, num_bytes: int) -> ApiError:
        # uvicorn throws away what comes behind an answer; a client that is cut off would not read it.
        is_hopeless = num_bytes > _MAX_DISCARDED_BYTES
        return ApiError(
            413,
            f"the body has {num_bytes} bytes or more, but at most {self._max_bytes} are taken; send less, or "
            "raise max_body_bytes",
            code="request_too_large",
            headers={"connection": "close"} if is_hopeless else None,
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the whole body first, and then what comes from the client, that it has left."""
    is_given = False

    async def next_message() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = scope.get("state", {}).get("request_id", "")
    await error_response(scope["path"], error, request_id)(scope, receive, send)


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _written_path(scope: Scope) -> str:
    """The path as it was sent: decoded, it could hold the end of a log's line."""
    return str(scope.get("raw_path", b"").decode("ascii", "backslashreplace"))


def _request_id(sent: str | None) -> str:
    if sent and len(sent) <= _MAX_ID_CHARACTERS and sent.isascii() and sent.isprintable():
        return sent
    return uuid4().hex
