"""Server-sent events: how one is written, and a response that ends its source on every path."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from kvkeep.server.disconnect import ClientLeftError, unless_disconnected

__all__ = ["DONE", "KEEP_ALIVE", "EventStream", "event"]

# A comment: clients pass over it, and proxies see that the connection lives.
KEEP_ALIVE = b": keep-alive\n\n"
# What the OpenAI protocol ends a stream with.
DONE = b"data: [DONE]\n\n"

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(payload: bytes, name: str | None = None) -> bytes:
    r"""One event; `payload` is JSON, so it has no line breaks of its own.

    >>> event(b"{}"), event(b"{}", "ping")
    (b'data: {}\n\n', b'event: ping\ndata: {}\n\n')
    """
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + payload + b"\n\n"


class EventStream(StreamingResponse):
    """Sends what a generator gives; when that ends or the client leaves, closes it, then `resources`.

    What the generator works on belongs into `resources`: it is closed even when nothing was ever sent.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        resources: AsyncExitStack | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            source, headers={**_HEADERS, **(headers or {})}, media_type="text/event-stream"
        )
        self._source = source
        self._resources = resources or AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **start})
            with suppress(ClientLeftError):
                await unless_disconnected(receive, self._send_events(send))
            if self.background is not None:
                await self.background()
        finally:
            try:
                await self._source.aclose()
            finally:
                await self._resources.aclose()

    async def _send_events(self, send: Send) -> None:
        async for events in self._source:
            await send({"type": "http.response.body", "body": events, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
