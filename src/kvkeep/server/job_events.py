"""The response that streams jobs: pieces become events, which leave in the moment in which they arrive.

a step of the engine ──> all its pieces in one call on the loop ──> StreamWriter ──> BodyWriter
└──> where the client is slow, or an output ends: a task ──> send
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Protocol

from starlette.types import Receive, Scope, Send

from kvkeep.engine import Piece
from kvkeep.server.jobs import JobStream
from kvkeep.server.openai_pieces import arrivals_of
from kvkeep.server.sse import EventStream

__all__ = ["BODY_WRITER", "BodyWriter", "JobEvents", "StreamWriter"]

# Where the state of a request has its BodyWriter; without one a task sends everything.
BODY_WRITER = "body_writer"


class BodyWriter(Protocol):
    """Writes parts of a response's body at once."""

    @property
    def can_write(self) -> bool:
        """Whether the client has read enough of what was written before."""
        ...

    def write(self, body: bytes) -> None:
        """Write a part; only while `can_write`, and behind the start of the response."""
        ...


class StreamWriter(Protocol):
    """Makes events of what a stream says: bytes, none where there is nothing to say."""

    @property
    def keep_alive(self) -> bytes:
        """What shows that the connection lives."""
        ...

    def start(self) -> bytes:
        """What is said before the first piece."""
        ...

    def take(self, piece: Piece, number: int) -> bytes:
        """What a piece of the job with this number adds."""
        ...

    def finish(self) -> bytes:
        """What is said behind the last piece."""
        ...

    def fail(self, error: Exception) -> bytes:
        """What is said of an error, which ends the stream."""
        ...


class JobEvents(EventStream):
    """Sends the events of jobs that were entered; they belong into `resources`."""

    def __init__(
        self,
        streams: Sequence[JobStream],
        writer: StreamWriter,
        *,
        keep_alive_s: float,
        resources: AsyncExitStack,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(self._events(), resources, headers)
        self._streams = streams
        self._writer = writer
        self._keep_alive_s = keep_alive_s
        self._is_sending = True  # the task has in hand what comes first
        self._is_silent = True  # nothing was written since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body_writer = scope.get("state", {}).get(BODY_WRITER)
        # With several jobs there may be pieces in the hands of the task at any time.
        if body_writer is not None and len(self._streams) == 1:
            self._streams[0].divert(partial(self._write, body_writer))
        await super().__call__(scope, receive, send)

    def _write(self, body_writer: BodyWriter, piece: Piece) -> bool:
        if self._is_sending or not body_writer.can_write:
            return False
        if events := self._writer.take(piece, 0):
            body_writer.write(events)
            self._is_silent = False
        return True

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """What the task sends."""
        try:
            if start := self._writer.start():
                yield start
            self._is_sending = False
            async for arrivals in arrivals_of(self._streams, self._keep_alive_s):
                self._is_sending = True
                # What is there at once leaves together: one write for the server, one read for the client.
                parts = [self._writer.take(one.piece, one.number) for one in arrivals]
                if events := b"".join(parts) if arrivals else self._sign_of_life():
                    yield events
                self._is_sending = False
            ending = self._writer.finish()
        except Exception as error:  # noqa: BLE001  the client is told, and the log
            ending = self._writer.fail(error)
        self._is_sending = True
        if ending:
            yield ending

    def _sign_of_life(self) -> bytes:
        was_silent, self._is_silent = self._is_silent, True
        return self._writer.keep_alive if was_silent else b""
