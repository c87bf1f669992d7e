"""The one asynchronous facade: a thread owns the engine, tasks of an event loop ask it.

    task:    submit ──> orders ──┐             ┌──> inbox of the submission ──> pieces
    thread:                      └─> add, step ┘    (the loop is woken once for all pieces of a step)

Orders are carried out between two steps, in the order in which they were given. No tensors here.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from threading import Event
from types import TracebackType
from typing import Self, TypeVar

from kvkeep.cache.explain import Outline
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.engine.engine import Engine
from kvkeep.engine.engine_thread import Arrival, EngineDownError, EngineThread, Order
from kvkeep.engine.outputs import Piece
from kvkeep.spec import RequestId

__all__ = ["AsyncEngine", "EngineDownError", "Submission"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
# The interpreter runs one thread at a time: without a pause the loop would have to wait with a first token
# until the next step has been planned.
_HANDOVER_S = 0.001


class AsyncEngine:
    """One thread owns the Engine; asyncio tasks ask it. All methods belong to the loop that called `start`.

    A step that fails (an error of the model) ends its own requests, whose last piece says
    FinishReason.ERROR; the others go on. When the thread itself fails, every submission and call raises
    EngineDownError, at once and from then on, and `is_healthy` is False: nobody waits for ever.
    """

    def __init__(self, engine: Engine) -> None:
        self._thread: EngineThread[Submission] = EngineThread(engine, self._arrived, self._ended)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._open: set[Submission] = set()
        self._drained = asyncio.Event()
        self._drained.set()

    @property
    def num_open(self) -> int:
        """Submissions that were entered and have neither ended nor been left."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Requests without a seat, as of the last step."""
        return self._thread.num_waiting

    @property
    def num_running(self) -> int:
        """Requests that hold blocks, as of the last step; one with n outputs counts n times."""
        return self._thread.num_running

    @property
    def is_healthy(self) -> bool:
        """Whether requests are taken: started, not closing, and the thread has not failed."""
        return self._loop is not None and not self._is_closing and not self._thread.has_ended

    @property
    def failure(self) -> str:
        """What made the thread fail; empty as long as it has not."""
        return self._thread.failure

    async def start(self) -> None:
        """Start the thread. Raises EngineDownError when it was started before, or closed."""
        if self._loop is not None or self._is_closing:
            raise EngineDownError(
                "the engine was started or closed before; make another AsyncEngine"
            )
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that run finish for `drain_s`, abort the rest, end the thread.

        Aborted ones end with FinishReason.ABORT; what they computed stays cached. The Engine stays open and
        belongs to the caller from then on. Calling it again waits for the same end.
        """
        was_closing, self._is_closing = self._is_closing, True
        if self._loop is None:
            return
        if not was_closing:
            await self._drain(drain_s)
            for submission in list(self._open):
                self._thread.give(Order(submission._abort))
            self._thread.give(Order(self._thread.stop))
        await asyncio.to_thread(self._thread.join)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        options: CacheOptions,
        *,
        outline: Outline | None = None,
        owner: str | None = None,
        explains: bool = False,
    ) -> "Submission":
        """A request as Engine.add takes it, queued when the submission is entered; see Submission."""

        def queue(engine: Engine) -> RequestId:
            return engine.add(
                prompt_ids, params, options, outline=outline, owner=owner, explains=explains
            )

        return Submission(self, queue)

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Run `work` between two steps on the owner's thread; returns its result, or raises its error.

        Decoding waits meanwhile. Work that has not begun when the caller is cancelled is not done.
        Raises EngineDownError when the engine is down; one that closes takes calls until it has stopped.
        """
        engine = self._thread.engine
        return await self._ask(lambda: work(engine))

    async def _ask(self, work: Callable[[], T]) -> T:
        if self._loop is None:
            raise EngineDownError("the engine was not started, or is closed; start it first")
        result: Future[T] = Future()
        self._thread.give(Order(work, result))
        return await asyncio.wrap_future(result)

    async def _drain(self, drain_s: float) -> None:
        if not self._open:
            return
        try:
            async with asyncio.timeout(max(drain_s, 0.0)):
                await self._drained.wait()
        except TimeoutError:
            _log.warning("%d requests are aborted", self.num_open)

    def _enter(self, submission: "Submission") -> None:
        if not self.is_healthy:
            raise self._thread.down_error()
        self._open.add(submission)
        self._drained.clear()

    def _leave(self, submission: "Submission") -> None:
        self._open.discard(submission)
        if not self._open:
            self._drained.set()

    def _refuse_open(self) -> None:
        for submission in list(self._open):
            submission._take(self._thread.down_error())

    # These two run on the thread.

    def _arrived(self, arrivals: "Sequence[Arrival[Submission]]") -> None:
        begun = [one.receiver for one in arrivals if not one.receiver._has_begun]
        for submission in begun:
            submission._has_begun = True
        are_taken = Event()
        self._to_loop(_take_all, arrivals, are_taken)
        if begun:
            are_taken.wait(_HANDOVER_S)

    def _ended(self) -> None:
        self._to_loop(self._refuse_open)

    def _to_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # Of a closed loop nobody is there to be told.
            if not self._loop.is_closed():
                raise


class Submission(AsyncIterator[Piece]):
    """One request on its way: enter it, then iterate over its pieces; the last one has the receipt.

        async with engine.submit(ids, params, options) as submission:
            async for piece in submission: ...

    Entering queues the request and raises RequestError or CapacityError for one that is refused,
    EngineDownError when the engine takes none. Leaving, early or not, aborts what still runs within one
    step, without waiting; finished blocks stay cached. Pieces wait here until they are taken: none is lost
    when `anext` or `ready` is cancelled. For one task at a time.
    """

    def __init__(self, owner: AsyncEngine, queue: Callable[[Engine], RequestId]) -> None:
        self._owner = owner
        self._add = queue
        self._inbox: deque[Piece | Exception] = deque()
        self._sink: Callable[[Piece], bool] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._request_id: RequestId | None = None
        self._is_entered = False
        self._has_begun = False  # a piece is on its way; only the engine's thread asks
        self._has_ended = False  # nothing comes any more

    async def __aenter__(self) -> Self:
        assert not self._is_entered, "a submission is entered once"
        self._is_entered = True
        self._owner._enter(self)
        try:
            await self._owner._ask(self._queue)
        except BaseException:
            self.leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Without awaiting: a cancelled task could not, and what it leaves must end all the same.
        self.leave()

    def leave(self) -> None:
        """Abort the request if it is not finished; nothing comes any more. Again does nothing."""
        if not self._has_ended:
            self._has_ended = True
            self._owner._leave(self)
            self._owner._thread.give(Order(self._forget))
        self._inbox.clear()
        self._wake()

    def divert(self, sink: Callable[[Piece], bool]) -> None:
        """Give pieces to `sink` as they come, on the loop, without waking a task.

        Those that it does not want (False), those behind them until all are taken, and those that end an
        output wait as usual. What it raises ends the request and is raised where pieces are taken.
        """
        self._sink = sink

    def interrupt(self, error: Exception) -> None:
        """Abort the request; `error` is raised behind the pieces that have arrived."""
        if not self._has_ended:
            self._owner._thread.give(Order(self._forget))
            self._take(error)

    async def ready(self, timeout_s: float) -> bool:
        """Wait until a piece is there, or the end; False when neither came in time. Takes nothing."""
        if not self._inbox and not self._has_ended:
            loop = asyncio.get_running_loop()
            # A timer on the future itself: cheaper than a task, for every token of every stream.
            self._waiter = waiter = loop.create_future()
            timer = loop.call_later(timeout_s, _wake, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
        return bool(self._inbox) or self._has_ended

    def take(self) -> list[Piece]:
        """The pieces that have arrived, without waiting; raises the error behind them at the next call."""
        pieces: list[Piece] = []
        while self._inbox:
            item = self._inbox[0]
            if isinstance(item, Exception):
                if not pieces:
                    self._inbox.popleft()
                    raise item
                break
            pieces.append(item)
            self._inbox.popleft()
        return pieces

    async def __anext__(self) -> Piece:
        while not self._inbox:
            if self._has_ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._inbox.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def _take(self, item: Piece | Exception) -> None:
        if self._has_ended or self._passes(item):
            return
        self._inbox.append(item)
        if isinstance(item, Exception) or item.receipt is not None:
            self._has_ended = True
            self._owner._leave(self)
        self._wake()

    def _passes(self, item: Piece | Exception) -> bool:
        """Whether the sink has taken it."""
        if self._sink is None or self._inbox:
            return False
        if isinstance(item, Exception) or item.finish_reason is not None:
            return False
        try:
            return self._sink(item)
        except Exception as error:  # noqa: BLE001  it is told where the pieces are taken
            self.interrupt(error)
            return True

    def _wake(self) -> None:
        if self._waiter is not None:
            _wake(self._waiter)

    # The rest runs on the engine's thread.

    def _queue(self) -> None:
        self._request_id = self._owner._thread.add(self, self._add)

    def _abort(self) -> None:
        if self._request_id is not None:
            self._owner._thread.abort(self._request_id)

    def _forget(self) -> None:
        if self._request_id is not None:
            self._owner._thread.forget(self._request_id)


def _take_all(arrivals: Sequence[Arrival[Submission]], are_taken: Event) -> None:
    for arrival in arrivals:
        arrival.receiver._take(arrival.piece)
    are_taken.set()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
