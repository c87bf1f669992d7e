"""One request from arrival to its last token, as counters and a lease."""

from enum import StrEnum

from kvkeep.blocks import TokenChain
from kvkeep.cache import Lease
from kvkeep.config import CacheOptions, SamplingParams
from kvkeep.spec import RequestId

__all__ = ["Request", "RequestStatus"]


class RequestStatus(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """Prompt and output tokens are one chain; what of it is in memory is in the lease."""

    def __init__(
        self,
        request_id: RequestId,
        chain: TokenChain,
        params: SamplingParams,
        options: CacheOptions,
    ) -> None:
        self.request_id = request_id
        self.chain = chain
        self.params = params
        self.options = options
        self.status = RequestStatus.WAITING
        self.num_prompt = len(chain)
        self.lease: Lease | None = None
        self.reused_tokens: int | None = None
        self.recomputed_tokens = 0
        self.num_preemptions = 0
        self._pending_when_preempted = 0

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.chain) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """Tokens generated so far."""
        return self.chain.tokens(self.num_prompt)

    def start(self, lease: Lease) -> None:
        """Run with `lease`; after a preemption, count what it no longer has, or has from others."""
        self.lease = lease
        self.status = RequestStatus.RUNNING
        if self.reused_tokens is None:
            self.reused_tokens = min(lease.reused_tokens, self.num_prompt)
            return
        lost = lease.num_pending - self._pending_when_preempted
        self.recomputed_tokens += max(0, lost)
        self.reused_tokens += max(0, -lost)

    def preempt(self) -> None:
        """Give the blocks back and wait."""
        self._pending_when_preempted = self.held_lease().num_pending
        self.num_preemptions += 1
        self.release()
        self.status = RequestStatus.WAITING

    def release(self) -> None:
        """Give the blocks back, if there are any."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def held_lease(self) -> Lease:
        """The lease of a running request."""
        assert self.lease is not None, "only a running request holds a lease"
        return self.lease
