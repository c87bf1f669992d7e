"""One request from arrival to its last token, as counters and a lease."""

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from kvkeep.blocks import TokenChain
from kvkeep.cache import Lease, Lookup
from kvkeep.cache.lifetimes import Claim
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.spec import RequestId, Span

__all__ = ["Request", "RequestStatus"]


class RequestStatus(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """Prompt and output tokens are one chain; what of it is in memory is in the lease.

    `claim` is what it puts on its blocks, shared by all outputs of a prompt; None asks for nothing. `origin`
    is the request for several outputs that this is one of; by default it is its own.
    """

    def __init__(
        self,
        request_id: RequestId,
        chain: TokenChain,
        params: SamplingParams,
        options: CacheOptions,
        claim: Claim | None = None,
        origin: RequestId | None = None,
    ) -> None:
        self.request_id = request_id
        self.origin = request_id if origin is None else origin
        self.chain = chain
        self.params = params
        self.options = options
        self.claim = claim
        self.status = RequestStatus.WAITING
        self.num_prompt = len(chain)
        self.lease: Lease | None = None
        self.lookup: Lookup | None = None
        self.reused_tokens: int | None = None
        self.recomputed_tokens = 0
        self.num_preemptions = 0
        # As the request found the cache: what was to be computed, what failed to come among it, and block
        # numbers that a tier had.
        self.found_gaps: tuple[Span, ...] = ()
        self.found_by_choice: frozenset[int] = frozenset()
        self.load_failures: Counter[str] = Counter()
        self.restore_s = 0.0
        self._number_to_source: dict[int, str] = {}
        self._pending_before = 0
        self._lost_by_failure = False

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.chain) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.chain.tokens(self.num_prompt)

    @property
    def tokens_by_source(self) -> dict[str, int]:
        """Of the prompt tokens that were reused, how many came from each tier."""
        sources: Counter[str] = Counter()
        size = self.chain.block_size
        for number, source in self._number_to_source.items():
            sources[source] += max(0, min(size, self.num_prompt - number * size))
        return dict(sources)

    @property
    def reused_spans(self) -> list[Span]:
        """The prompt tokens that the request found and need not compute."""
        starts = [0, *(gap.stop for gap in self.found_gaps)]
        stops = [*(gap.start for gap in self.found_gaps), self.num_prompt]
        return [Span(a, b) for a, b in zip(starts, stops, strict=True) if a < b]

    def start(self, lease: Lease) -> None:
        """Run with `lease`; after a pause, count what it no longer has, or has from others."""
        self.lease = lease
        self.status = RequestStatus.RUNNING
        if self.reused_tokens is None:
            self.reused_tokens = min(lease.reused_tokens, self.num_prompt)
            self.found_gaps = tuple(lease.gaps)
            if lease.decision is not None:
                self.found_by_choice = lease.decision.computed
            return
        lost = lease.num_pending - self._pending_before
        if lost > 0 and not self._lost_by_failure:
            self.recomputed_tokens += lost
        else:
            self.reused_tokens -= lost
        if self._lost_by_failure:
            self.found_gaps = _joined([*self.found_gaps, *lease.gaps], self.num_prompt)

    def preempt(self) -> None:
        """Give the blocks back and wait."""
        self.num_preemptions += 1
        self._pause(lost_by_failure=False)

    def pause_for_gaps(self) -> None:
        """Give the blocks back, because some that were to be loaded have to be computed."""
        self._pause(lost_by_failure=True)

    def _pause(self, *, lost_by_failure: bool) -> None:
        self._pending_before = self.held_lease().num_pending
        self._lost_by_failure = lost_by_failure
        self.release()
        self.status = RequestStatus.WAITING

    def release(self) -> None:
        """Give the blocks back, if there are any."""
        lease, self.lease = self.lease, None
        if lease is not None:
            self._number_to_source |= lease.loaded
            self.load_failures.update(lease.failed.values())
            self.restore_s += lease.restore_s
            lease.release()

    def held_lease(self) -> Lease:
        """The lease of a running request."""
        assert self.lease is not None, "only a running request holds a lease"
        return self.lease


def _joined(spans: Sequence[Span], limit: int) -> tuple[Span, ...]:
    """The positions below `limit` that lie in any of the spans."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda one: one.start):
        stop = min(span.stop, limit)
        if joined and span.start <= joined[-1].stop:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, stop))
        elif span.start < stop:
            joined.append(Span(span.start, stop))
    return tuple(joined)
