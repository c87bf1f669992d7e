"""Who runs in a step: a budget of tokens, spent on spans. There is no prefill phase and no decode phase.

A request that needs one token (it decodes) comes first, so that a long prompt never stalls the rest; what
is left of the budget is shared by the requests that still have gaps, oldest first.
"""

from collections import deque
from dataclasses import dataclass

from kvkeep.cache import KVCache, Lease
from kvkeep.planning import cut_spans
from kvkeep.scheduling.request import Request, RequestStatus
from kvkeep.spec import Span

__all__ = ["PlannedWork", "Scheduler", "StepPlan"]

# Beside decoding requests, gaps get this share of the budget, so that the time between two tokens of a
# stream stays bounded by a short step.
_GAP_SHARE_BESIDE_DECODE = 4
# Gaps of this many requests are worked on at once; more would only make each of them later.
_MAX_REQUESTS_WITH_GAPS = 4
_WAIT_FOR_ROOM_S = 1.0
# One of so many seats is not for further outputs of a request: others that come find one.
_SEATS_PER_FREE_ONE = 4


@dataclass(frozen=True, slots=True)
class PlannedWork:
    """The spans of one request in this step; `is_last` when nothing of it remains to be computed after."""

    request: Request
    spans: tuple[Span, ...]
    is_last: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the request that the step computes."""
        return sum(len(span) for span in self.spans)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, and who had to give blocks back for it."""

    work: tuple[PlannedWork, ...]
    preempted: tuple[Request, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(work.num_tokens for work in self.work)


class Scheduler:
    """Two queues over one KVCache: who waits, and who holds a lease."""

    def __init__(self, cache: KVCache, *, max_batch_tokens: int, max_requests: int) -> None:
        self._cache = cache
        self._max_batch_tokens = max_batch_tokens
        self._max_requests = max_requests
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # in order of arrival

    @property
    def num_waiting(self) -> int:
        """Requests without a lease."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a lease."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        self._waiting.append(request)

    def add_running(self, request: Request, lease: Lease) -> None:
        """Let a fork run with the lease it was given; the caller checked `has_seat`."""
        self._start(request, lease)

    def has_seat(self, request: Request) -> bool:
        """Whether this request may run; of one for many outputs not all do at once."""
        if len(self._running) >= self._max_requests:
            return False
        most = self._max_requests - self._max_requests // _SEATS_PER_FREE_ONE
        return sum(one.origin == request.origin for one in self._running) < most

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and give its blocks back."""
        if request.status is RequestStatus.RUNNING:
            self._running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.release()

    def plan(self) -> StepPlan:
        """Choose the next step's spans; admits, extends leases and preempts where memory runs out."""
        self._retry_failed()
        self._admit()
        step = _Step(self._max_batch_tokens)
        runnable = [r for r in self._running if r.held_lease().runnable_gaps]
        decoding = [request for request in runnable if request.held_lease().num_pending == 1]
        for request in decoding:
            self._plan_request(step, request, step.budget)
        if step.request_to_work:
            step.budget = min(step.budget, self._max_batch_tokens // _GAP_SHARE_BESIDE_DECODE)
        with_gaps = [r for r in runnable if r not in decoding][:_MAX_REQUESTS_WITH_GAPS]
        for at, request in enumerate(with_gaps):
            # An even share; what short requests leave of theirs goes to those behind them.
            self._plan_request(step, request, -(-step.budget // (len(with_gaps) - at)))
        if with_gaps and step.budget > 0:
            self._spend_rest(step, with_gaps)
        return StepPlan(tuple(step.request_to_work.values()), tuple(step.preempted))

    def _admit(self) -> None:
        """Give leases to waiting requests, in order; one whose blocks another computes now waits on."""
        skipped: deque[Request] = deque()
        while self._waiting and len(self._running) < self._max_requests:
            request = self._waiting.popleft()
            if not self.has_seat(request):
                skipped.append(request)
                continue
            if self._would_thrash(request):
                self._waiting.appendleft(request)
                break
            if self._would_repeat(request) or self._should_wait(request):
                skipped.append(request)
                continue
            lease = self._reserve(request)
            if lease is None:
                self._waiting.appendleft(request)
                break
            self._start(request, lease)
        self._waiting.extendleft(reversed(skipped))

    def _reserve(self, request: Request) -> Lease | None:
        options = request.options
        return self._cache.reserve(
            request.chain,
            read=options.read,
            write=options.write,
            lookup=request.lookup,
            claim=request.claim,
        )

    def _retry_failed(self) -> None:
        """What could not be loaded is a gap of its request, which keeps everything behind it."""
        for request in list(self._running):
            lease = request.held_lease()
            if not lease.failed or lease.loads:
                continue
            self._cache.avoid_failed(lease, request.lookup)
            self._running.remove(request)
            request.pause_for_gaps()
            again = self._reserve(request)
            if again is None:
                self._waiting.appendleft(request)
            else:
                self._start(request, again)

    def _should_wait(self, request: Request) -> bool:
        """Whether tiers are still being asked for it, or another request loads what it needs."""
        return request.options.read and self._cache.is_awaited(request.chain, request.lookup)

    def _would_thrash(self, request: Request) -> bool:
        """Whether a request that gave its blocks back would have to do so again at once."""
        if not request.num_preemptions or not self._running:
            return False
        needed = self._cache.blocks_needed(len(request.chain) + 1, self._max_batch_tokens)
        available = self._cache.num_available()
        return any(need > have for need, have in zip(needed, available, strict=True))

    def _would_repeat(self, request: Request) -> bool:
        """Whether a running request is computing the first block that this one is missing."""
        writers = [r.held_lease() for r in self._running if r.held_lease().num_pending > 1]
        if not writers or not request.options.read or not request.chain.keys:
            return False
        if not any(lease.chain.keys[:1] == request.chain.keys[:1] for lease in writers):
            return False
        block = self._cache.gaps(request.chain)[0].start // self._cache.spec.block_size
        if block >= len(request.chain.keys):
            return False
        key = request.chain.keys[block]
        return any(lease.will_publish(block, key) for lease in writers)

    def _plan_request(self, step: "_Step", request: Request, budget: int) -> None:
        """Plan spans of `request`, making room if need be; plans nothing when it is preempted itself."""
        if request.status is not RequestStatus.RUNNING:
            return
        lease = request.held_lease()
        spans = self._cut(lease, min(budget, step.budget))
        if not spans:
            return
        while not self._cache.extend(lease, spans):
            victim = self._running[-1]
            if len(self._running) == 1:
                if self._cache.wait(_WAIT_FOR_ROOM_S):
                    self._cache.poll()  # what has arrived gives up the places that it held
                    continue
                if self._cache.extend_over_pins(lease, spans):
                    break
                lease = self._restart_alone(request)
                spans = self._cut(lease, step.budget)
                continue
            self._preempt(step, victim)
            if victim is request:
                return
        is_last = spans[-1].stop == len(lease.chain)
        step.plan(PlannedWork(request, spans, is_last))

    def _cut(self, lease: Lease, budget: int) -> tuple[Span, ...]:
        return cut_spans(self._cache.spec, lease.runnable_gaps, len(lease.chain), budget)

    def _spend_rest(self, step: "_Step", requests: list[Request]) -> None:
        """Give the budget that is left to the oldest request that can use it."""
        for request in requests:
            planned = step.request_to_work.get(request)
            if planned is None or planned.is_last or self._cache.spec.is_recurrent:
                continue
            lease = request.held_lease()
            budget = step.budget + planned.num_tokens
            spans = self._cut(lease, budget)
            # Where there is no room the smaller plan stands: nobody is preempted for leftovers.
            if self._cache.extend(lease, spans):
                step.cancel(request)
                step.plan(PlannedWork(request, spans, spans[-1].stop == len(lease.chain)))

    def _preempt(self, step: "_Step", request: Request) -> None:
        """Take the request's blocks; it resumes later with the same tokens."""
        step.cancel(request)
        step.preempted.append(request)
        self._running.remove(request)
        request.preempt()
        self._waiting.appendleft(request)

    def _restart_alone(self, request: Request) -> Lease:
        """Let the only running request begin again without what it holds for later gaps."""
        assert request.held_lease().reused_tokens, "a request that fits has room when it is alone"
        request.preempt()
        lease = self._cache.reserve(
            request.chain, read=False, write=request.options.write, claim=request.claim
        )
        assert lease is not None
        request.start(lease)
        return lease

    def _start(self, request: Request, lease: Lease) -> None:
        request.start(lease)
        self._running.append(request)
        self._running.sort(key=lambda running: running.request_id)


class _Step:
    """A plan in the making."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.request_to_work: dict[Request, PlannedWork] = {}
        self.preempted: list[Request] = []

    def plan(self, work: PlannedWork) -> None:
        self.request_to_work[work.request] = work
        self.budget -= work.num_tokens

    def cancel(self, request: Request) -> None:
        work = self.request_to_work.pop(request, None)
        if work is not None:
            self.budget += work.num_tokens
