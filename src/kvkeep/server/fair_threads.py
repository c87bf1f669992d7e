"""Threads for what takes long beside the loop: tenants take turns, so that much work delays its owner."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.limits import too_many

__all__ = ["FairThreads"]

T = TypeVar("T")


class FairThreads:
    """A few threads, and those who wait for one. Belongs to one event loop."""

    def __init__(self, num_threads: int, name: str, *, max_waiting: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._num_free = num_threads
        self._max_waiting = max_waiting
        self.num_waiting = 0
        # Whose turn it is comes first.
        self._tenant_to_turns: OrderedDict[TenantId, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, asker: Tenant, work: Callable[[], T]) -> T:
        """The result of `work`, done in a thread; work that has not begun when this is cancelled is not done.

        Raises ApiError 429 when too much is waiting.
        """
        await self._take_thread(asker.tenant_id)
        working = asyncio.get_running_loop().run_in_executor(self._threads, work)
        working.add_done_callback(self._has_ended)
        # A thread that works cannot be stopped: it is taken until it has ended, whoever waits.
        return await asyncio.shield(working)

    def close(self) -> None:
        """Begin nothing any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _take_thread(self, tenant_id: TenantId) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        if self.num_waiting >= self._max_waiting:
            raise too_many(f"{self.num_waiting} prompts are waiting to be encoded")
        turn = asyncio.get_running_loop().create_future()
        self._tenant_to_turns.setdefault(tenant_id, deque()).append(turn)
        self.num_waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give_thread()
            raise
        finally:
            self.num_waiting -= 1

    def _has_ended(self, working: "asyncio.Future[T]") -> None:
        if not working.cancelled():
            working.exception()  # whoever left does not ask for it
        self._give_thread()

    def _give_thread(self) -> None:
        """To the next of the tenant whose turn it is."""
        while self._tenant_to_turns:
            tenant_id, turns = self._tenant_to_turns.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._tenant_to_turns[tenant_id] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
