"""Threads that move blocks beside compute: a lane for each kind of way, with a bounded queue.

What comes out is collected by whoever owns the books, on his own thread: workers touch bytes only.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from logging import getLogger
from threading import Condition, Thread

__all__ = ["Lane", "Results"]

_log = getLogger(__name__)
_CLOSING_S = 5.0


class Results:
    """What workers have finished, in order; the owner of the books takes it all at once."""

    def __init__(self) -> None:
        self._done: deque[Callable[[], None]] = deque()
        self._arrived = Condition()

    def add(self, finish: Callable[[], None]) -> None:
        """Leave what the owner is to do now that something is finished; from any thread."""
        with self._arrived:
            self._done.append(finish)
            self._arrived.notify_all()

    def take(self) -> list[Callable[[], None]]:
        """All that has arrived; the caller runs it."""
        with self._arrived:
            taken = list(self._done)
            self._done.clear()
        return taken

    def wait(self, timeout_s: float) -> bool:
        """Wait until something has arrived; False if nothing does in time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: bool(self._done), timeout_s)


class Lane:
    """A bounded queue and the threads that work on it; the lowest rank goes first.

    Threads start with the first job and end with `close`.
    """

    def __init__(self, name: str, *, num_threads: int, max_jobs: int) -> None:
        self.name = name
        self._num_threads = num_threads
        self._max_jobs = max_jobs
        self._jobs: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._changed = Condition()
        self._threads: list[Thread] = []
        self._is_open = True

    @property
    def num_waiting(self) -> int:
        """Jobs that no thread has begun."""
        return len(self._jobs)

    def submit(self, job: Callable[[], None], *, rank: int = 0) -> bool:
        """Queue a job, which must not raise; False, at once, when the queue is full or closed."""
        with self._changed:
            if not self._is_open or len(self._jobs) >= self._max_jobs:
                return False
            heappush(self._jobs, (rank, next(self._order), job))
            if len(self._threads) < self._num_threads:
                self._start()
            self._changed.notify()
            return True

    def close(self, *, timeout_s: float = _CLOSING_S) -> None:
        """Finish what is queued, then end the threads; one that hangs is left to end with the process."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)
            if thread.is_alive():
                _log.warning("%s still waits for its tier after %g s", thread.name, timeout_s)
        self._threads.clear()

    def _start(self) -> None:
        name = f"kvkeep-{self.name}-{len(self._threads)}"
        thread = Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or not self._is_open)
                if not self._jobs:
                    return
                job = heappop(self._jobs)[2]
            try:
                job()
            except Exception:  # noqa: BLE001 - the lane must go on
                _log.exception("a job of lane %s raised, which none may", self.name)
