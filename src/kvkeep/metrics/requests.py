"""Counters and histograms of requests, filled from their receipts."""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric

from kvkeep.metrics.base import COMPUTED, DEVICE, ReceiptCounts
from kvkeep.metrics.instruments import Counter, Histogram

__all__ = ["REUSE_CLASSES", "RequestCounters", "Times", "reuse_class"]

_FINISH_REASONS = ("stop", "length", "abort", "error")
REUSE_CLASSES = ("hit", "partial", "miss")
# Upper bounds; the quantiles that a board shows are as fine as these.
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0),
)
_GAP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
_TOKENS = tuple(float(2**power) for power in range(21))


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """How long a request took, in seconds; None is not known.

    `first_token_s` and `total_s` count from its arrival, `gaps_s` are between the tokens of each of its
    outputs. `queue_s` went by before its first step, `restore_s` from its first load to the last block that
    came from a tier, and `saved_s` is an estimate of what it would have computed longer without the cache.
    """

    total_s: float
    first_token_s: float | None = None
    gaps_s: Sequence[float] = ()
    queue_s: float | None = None
    restore_s: float | None = None
    saved_s: float | None = None


def reuse_class(prompt_tokens: int, reused_tokens: int, block_size: int) -> str:
    """Of REUSE_CLASSES, by the full blocks of a prompt: "hit" where all were there, "miss" where none was.

    A prompt without a full block is a miss, whatever it shares with the beginning of another one's.
    """
    # The last token is computed even where its block was there.
    most_computed = max(1, prompt_tokens % block_size)
    if prompt_tokens >= block_size and prompt_tokens - reused_tokens <= most_computed:
        return "hit"
    return "partial" if reused_tokens >= block_size else "miss"


class RequestCounters:
    """What requests cost and how long they took, since the start."""

    def __init__(self) -> None:
        self._make_counters()
        self._make_times()
        self._make_sizes()
        for reason in _FINISH_REASONS:
            self._requests.begin(reason)
        for reuse in REUSE_CLASSES:
            self._first_token.begin(reuse)
        for source in (DEVICE, COMPUTED):
            self._prompt_tokens.begin(source)

    def observe(
        self, receipt: ReceiptCounts, finish_reason: str, times: Times, *, reuse: str
    ) -> None:
        """Count a request that has ended; `reuse` is one of REUSE_CLASSES."""
        assert reuse in REUSE_CLASSES
        self._requests.add(1, str(finish_reason))
        self._output_tokens.add(receipt.output_tokens)
        self._recomputed.add(receipt.recomputed_tokens)
        self._preemptions.add(receipt.num_preemptions)
        self._prompt_sizes.observe([receipt.prompt_tokens])
        self._output_sizes.observe([receipt.output_tokens])
        # How much of its prompt a request was given that was ended early, nobody knows.
        if finish_reason not in ("abort", "error") or times.first_token_s is not None:
            for source, num_tokens in receipt.tokens_by_source.items():
                self._prompt_tokens.add(num_tokens, source)
            self._computed_sizes.observe([receipt.computed_tokens])
        self._observe_times(times, receipt.output_tokens, reuse)

    def observe_miss(self, reason: str) -> None:
        """Count a request of which something was missed in the cache, by why."""
        self._misses.add(1, reason)

    def observe_lost(self) -> None:
        """Count a request that was aborted, and whose receipt nobody has seen."""
        self._requests.add(1, "abort")

    def observe_response(self, route: str, status: int) -> None:
        """Count an answer over HTTP, by the pattern of its route and its status."""
        self._responses.add(1, route, str(status))

    def collect(self) -> list[Metric]:
        """Everything as of now."""
        parts = [part for part in vars(self).values() if isinstance(part, Counter | Histogram)]
        return [part.collect() for part in parts]

    def _observe_times(self, times: Times, num_tokens: int, reuse: str) -> None:
        self._request_s.observe([times.total_s])
        self._gaps.observe(times.gaps_s)
        self._saved_s.add(times.saved_s or 0.0)
        if times.queue_s is not None:
            self._queue_s.observe([times.queue_s])
        if times.restore_s is not None:
            self._restore_s.observe([times.restore_s])
        if times.first_token_s is None:
            return
        self._first_token.observe([times.first_token_s], reuse)
        if times.queue_s is not None:
            self._prefill_s.observe([max(0.0, times.first_token_s - times.queue_s)])
        decode_s = max(0.0, times.total_s - times.first_token_s)
        self._decode_s.observe([decode_s])
        if num_tokens > 1:
            self._per_token.observe([decode_s / (num_tokens - 1)])

    def _make_counters(self) -> None:
        self._requests = Counter(
            "kvkeep_requests", "Requests that have ended, by why.", ["finish_reason"]
        )
        self._prompt_tokens = Counter(
            "kvkeep_prompt_tokens", "Prompt tokens, by where their K/V came from.", ["source"]
        )
        self._output_tokens = Counter("kvkeep_output_tokens", "Tokens generated.")
        self._recomputed = Counter(
            "kvkeep_recomputed_tokens", "Tokens computed again after a preemption."
        )
        self._preemptions = Counter("kvkeep_preemptions", "Running requests that had to give way.")
        self._misses = Counter(
            "kvkeep_misses", "Requests that asked why they missed something, by why.", ["reason"]
        )
        self._saved_s = Counter(
            "kvkeep_saved_seconds", "Seconds of computing that reuse has saved, estimated."
        )
        self._responses = Counter(
            "kvkeep_http_responses", "Answers over HTTP.", ["route", "status"]
        )

    def _make_times(self) -> None:
        self._first_token = Histogram(
            "kvkeep_time_to_first_token_seconds",
            "From the request to its first token, by how much of the prompt was reused.",
            _SECONDS,
            ["reuse"],
        )
        self._gaps = Histogram(
            "kvkeep_inter_token_seconds", "Between two tokens of one output.", _GAP_SECONDS
        )
        self._per_token = Histogram(
            "kvkeep_time_per_output_token_seconds",
            "Mean of a request, without its first token.",
            _GAP_SECONDS,
        )
        self._request_s = Histogram(
            "kvkeep_request_seconds", "From the request to its last token.", _SECONDS
        )
        self._queue_s = Histogram(
            "kvkeep_queue_seconds", "From the request to its first step.", _SECONDS
        )
        self._prefill_s = Histogram(
            "kvkeep_prefill_seconds", "From the first step to the first token.", _SECONDS
        )
        self._decode_s = Histogram(
            "kvkeep_decode_seconds", "From the first token to the last.", _SECONDS
        )
        self._restore_s = Histogram(
            "kvkeep_restore_seconds", "From the first load to the last block from a tier.", _SECONDS
        )

    def _make_sizes(self) -> None:
        self._prompt_sizes = Histogram(
            "kvkeep_request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._computed_sizes = Histogram(
            "kvkeep_request_computed_tokens", "Prompt tokens that a request computed.", _TOKENS
        )
        self._output_sizes = Histogram(
            "kvkeep_request_output_tokens", "Tokens that a request generated.", _TOKENS
        )
