"""Calls to other machines: until when each may take, how many run at once, and how one says that it failed.

A fault of a medium is raised as CallError inside a tier and leaves it as a miss, an absence or a failed put.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock
from time import monotonic
from typing import TypeVar

from kvkeep.errors import TierError
from kvkeep.tiers.base import MissCause

__all__ = ["BoundedCalls", "CallError", "Deadline", "SettingError", "Turns"]

T = TypeVar("T")


class CallError(TierError):
    """A call that gave nothing; `cause` is what the tier's miss says."""

    def __init__(self, cause: MissCause, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


class SettingError(CallError):
    """Unavailable, and will stay so until a setting changes here or there: a password, a certificate."""

    def __init__(self, reason: str) -> None:
        super().__init__(MissCause.UNAVAILABLE, reason)


class Deadline:
    """The instant at which one call, with all it waits for, gives up."""

    __slots__ = ("_at_s", "_clock", "timeout_s")

    def __init__(self, timeout_s: float, clock: Callable[[], float] = monotonic) -> None:
        self.timeout_s = timeout_s
        self._clock = clock
        self._at_s = clock() + timeout_s

    def left_s(self) -> float:
        """Seconds left, more than 0; raises CallError (LATE) when there are none."""
        left_s = self._at_s - self._clock()
        if left_s <= 0:
            raise CallError(MissCause.LATE, f"no answer within {self.timeout_s:g} s")
        return left_s

    def remaining_s(self) -> float:
        """Seconds left, or 0."""
        return max(0.0, self._at_s - self._clock())

    def at_most(self, timeout_s: float) -> "Deadline":
        """A deadline for a part of the call: `timeout_s` from now, and never later than this one."""
        return Deadline(min(timeout_s, self.left_s()), self._clock)

    def prolong(self, seconds: float) -> None:
        """Give back time that the caller, and not the medium, has spent."""
        self._at_s += seconds


class Turns:
    """At most so many calls at once, first come, first served.

    Who ends a call and begins the next one at once would otherwise be sooner than those that wait, again and
    again, until these are late.
    """

    __slots__ = ("_free", "_lock", "_waiting")

    def __init__(self, num_turns: int) -> None:
        self._free = deque([None] * num_turns)
        self._waiting: deque[Lock] = deque()
        self._lock = Lock()

    def take_now(self) -> bool:
        """Begin a call, which ends with `give_back`, unless others run or wait."""
        if self._waiting:
            return False
        try:
            self._free.pop()
        except IndexError:
            return False
        return True

    def take(self, timeout_s: float) -> bool:
        """Begin a call as soon as it is one's turn; False when that does not come in time."""
        if self.take_now():
            return True
        turn = Lock()
        turn.acquire()
        with self._lock:
            self._waiting.append(turn)
        # One may have been given back just before it was known that somebody waits.
        self._hand_out()
        if turn.acquire(timeout=timeout_s):
            return True
        with self._lock:
            if turn not in self._waiting:
                # It was handed out in this very moment.
                return True
            self._waiting.remove(turn)
            return False

    def give_back(self) -> None:
        """End a call."""
        self._free.append(None)
        if self._waiting:
            self._hand_out()

    def _hand_out(self) -> None:
        with self._lock:
            while self._waiting:
                try:
                    self._free.pop()
                except IndexError:
                    return
                self._waiting.popleft().release()


class BoundedCalls:
    """Runs calls that cannot be interrupted on at most `num_calls` threads, which start when needed.

    A caller waits for a thread and for the result until its deadline. A call that is given up keeps its
    thread until it ends by itself, so that a server that hangs holds so many threads and no more.
    """

    def __init__(self, num_calls: int, *, name: str) -> None:
        self._turns = Turns(num_calls)
        self._threads = ThreadPoolExecutor(num_calls, thread_name_prefix=f"kvkeep-{name}")

    def start(self, work: Callable[[], T], deadline: Deadline) -> Future[T]:
        """Begin a call as soon as a thread is free; raises CallError (LATE) when none is in time."""
        if not self._turns.take(deadline.left_s()):
            raise CallError(MissCause.LATE, f"all calls were busy for {deadline.timeout_s:g} s")
        try:
            future = self._threads.submit(work)
        except RuntimeError as error:
            self._turns.give_back()
            raise CallError(MissCause.UNAVAILABLE, "closed") from error
        future.add_done_callback(lambda _: self._turns.give_back())
        return future

    def finish(self, future: Future[T], deadline: Deadline) -> T:
        """The result of a call, or what it raised; raises CallError (LATE) when there is none in time."""
        try:
            return future.result(deadline.remaining_s())
        except TimeoutError:
            # A call may raise the same exception of its own.
            if future.done() and not future.cancelled() and future.exception() is not None:
                raise
        except CancelledError as error:
            raise CallError(MissCause.UNAVAILABLE, "closed") from error
        future.cancel()
        raise CallError(MissCause.LATE, f"no answer within {deadline.timeout_s:g} s")

    def run(self, work: Callable[[], T], deadline: Deadline) -> T:
        """The result of `work`, or what it raised."""
        return self.finish(self.start(work, deadline), deadline)

    def close(self) -> None:
        """Take no more calls and forget those that have not begun; does not wait for the others."""
        self._threads.shutdown(wait=False, cancel_futures=True)
