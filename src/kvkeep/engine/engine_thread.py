"""The thread that owns an engine: orders in, steps, pieces out. Knows no event loop and no tensors."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any, Generic, TypeVar

from kvkeep.engine.engine import Engine
from kvkeep.engine.outputs import Piece
from kvkeep.errors import KVKeepError
from kvkeep.spec import RequestId

__all__ = ["Arrival", "EngineDownError", "EngineThread", "Order"]

T = TypeVar("T")
Receiver = TypeVar("Receiver")

_log = logging.getLogger(__name__)
# An idle engine takes a step so often, for what its cache does by the clock.
_IDLE_S = 0.5
# Requests that wait although nothing runs and nothing is on its way are ended after so long.
_STANDSTILL_S = 2.0
_STANDSTILL_PAUSE_S = 0.01
# A failing step ends at least one request; this many more in a row, and the engine is broken.
_MORE_FAILURES = 3


class EngineDownError(KVKeepError):
    """The engine takes no requests: it was not started, it stops, or its thread has failed."""


@dataclass(frozen=True, slots=True)
class Arrival(Generic[Receiver]):
    """A piece, and who asked for it."""

    receiver: Receiver
    piece: Piece


class Order:
    """Something to do between two steps; `result`, if anybody waits for it, is done in any case."""

    def __init__(self, run: Callable[[], Any], result: "Future[Any] | None" = None) -> None:
        self._work = run
        self._result = result

    def run(self) -> None:
        """Do it, and pass on what it returns or raises; what was cancelled meanwhile is not done."""
        if self._result is None:
            self._work()
        elif self._result.set_running_or_notify_cancel():
            try:
                value = self._work()
            except Exception as error:  # noqa: BLE001  it belongs to whoever waits
                self._result.set_exception(error)
            else:
                self._result.set_result(value)

    def refuse(self, error: EngineDownError) -> None:
        """Tell whoever waits that it will not be done."""
        if self._result is not None and self._result.set_running_or_notify_cancel():
            self._result.set_exception(error)


class EngineThread(Generic[Receiver]):
    """Owns an Engine from `start` until the thread has ended.

    `give`, `failure` and the counts may be used by every thread; `add`, `abort`, `forget` and `stop` are what
    orders do. `deliver` gets the pieces of a step, and `ended` is called at the very end, both on the
    thread itself.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: "Callable[[Sequence[Arrival[Receiver]]], None]",
        ended: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.failure = ""
        self.has_ended = False
        self.num_waiting = 0
        self.num_running = 0
        self._deliver = deliver
        self._ended = ended
        self._thread = Thread(target=self._run, name="kvkeep-engine", daemon=True)
        self._orders: SimpleQueue[Order] = SimpleQueue()
        # Makes sure that no order is left in the queue when the thread ends.
        self._guard = Lock()
        self._should_stop = False
        self._id_to_receiver: dict[RequestId, Receiver] = {}
        self._num_failures = 0
        self._stands_since_s: float | None = None

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def give(self, order: Order) -> None:
        """Have an order carried out between two steps, or refused when the thread has ended."""
        with self._guard:
            if not self.has_ended:
                self._orders.put(order)
                return
        order.refuse(self.down_error())

    def down_error(self) -> EngineDownError:
        """Why nothing is taken."""
        if self.failure:
            return EngineDownError(f"the engine has failed ({self.failure}); restart the server")
        return EngineDownError("the engine has stopped; send the request to another server")

    def add(self, receiver: Receiver, queue: Callable[[Engine], RequestId]) -> RequestId:
        """Queue a request whose pieces are for `receiver`; raises what Engine.add raises."""
        request_id = queue(self.engine)
        self._id_to_receiver[request_id] = receiver
        return request_id

    def abort(self, request_id: RequestId) -> None:
        """End a request; its last pieces are given out."""
        self._send(self.engine.abort(request_id))

    def forget(self, request_id: RequestId) -> None:
        """End a request whose pieces nobody wants any more."""
        self._id_to_receiver.pop(request_id, None)
        self.engine.abort(request_id)

    def stop(self) -> None:
        """End the thread after this order."""
        self._should_stop = True

    def _run(self) -> None:
        try:
            while True:
                self._carry_out_orders()
                if self._should_stop:
                    break
                self._step()
        except BaseException as error:  # noqa: BLE001  whatever it is, everybody who waits must be told
            self.failure = f"{type(error).__name__}: {error}"
            _log.critical("the engine's thread has failed", exc_info=True)
        finally:
            self.num_waiting = self.num_running = 0
            with self._guard:
                self.has_ended = True
            while not self._orders.empty():
                self._orders.get_nowait().refuse(self.down_error())
            self._ended()

    def _carry_out_orders(self) -> None:
        """All that were given; waits for one while there is nothing else to do."""
        if not self.engine.has_work:
            self._carry_out_next(_IDLE_S)
        while not self._should_stop and not self._orders.empty():
            self._orders.get_nowait().run()

    def _carry_out_next(self, wait_s: float) -> None:
        try:
            order = self._orders.get(timeout=wait_s)
        except Empty:
            return
        order.run()

    def _step(self) -> None:
        num_before = self.engine.num_steps
        try:
            pieces = self.engine.step()
        except Exception:
            self._num_failures += 1
            if self._num_failures > len(self._id_to_receiver) + _MORE_FAILURES:
                raise
            _log.exception("a step has failed")
            return
        self._num_failures = 0
        self.num_waiting, self.num_running = self.engine.num_waiting, self.engine.num_running
        self._send(pieces)
        stands = self.engine.has_work and not pieces and self.engine.num_steps == num_before
        self._watch_for_standstill(stands=stands and not self.engine.is_waiting)

    def _send(self, pieces: Sequence[Piece]) -> None:
        arrived = []
        for piece in pieces:
            receiver = self._id_to_receiver.get(piece.request_id)
            if receiver is None:
                continue  # it was forgotten
            arrived.append(Arrival(receiver, piece))
            if piece.receipt is not None:
                del self._id_to_receiver[piece.request_id]
        if arrived:
            self._deliver(arrived)

    def _watch_for_standstill(self, *, stands: bool) -> None:
        """End requests that would wait for ever, which no state of the cache should bring about."""
        if not stands:
            self._stands_since_s = None
            return
        now_s = monotonic()
        if self._stands_since_s is None:
            self._stands_since_s = now_s
        if now_s - self._stands_since_s < _STANDSTILL_S:
            self._carry_out_next(_STANDSTILL_PAUSE_S)
            return
        _log.error("%d requests wait although nothing runs", len(self._id_to_receiver))
        for request_id in list(self._id_to_receiver):
            self.abort(request_id)
