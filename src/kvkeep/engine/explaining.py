"""Why requests computed what they did: told to those that ask, from what was sent and given up lately."""

from kvkeep.cache import KVCache
from kvkeep.cache.explain import History, Miss, Sent
from kvkeep.scheduling import Request
from kvkeep.spec import Span

__all__ = ["Explaining"]


class Explaining:
    """The history of one engine, kept while its requests come and go."""

    def __init__(self, cache: KVCache) -> None:
        self.history = History()
        cache.administration.tell(self.history)
        self._request_to_sent: dict[Request, Sent] = {}
        # Of those that want to know, the gaps that were explained to them.
        self._request_to_told: dict[Request, tuple[Span, ...] | None] = {}

    def add(self, request: Request, sent: Sent, *, is_wanted: bool) -> None:
        """A request has come; `is_wanted`: it wants to know why it has misses."""
        self._request_to_sent[request] = sent
        if is_wanted:
            self._request_to_told[request] = None

    def is_asked(self, request: Request) -> bool:
        """Whether a request that has not ended wants to know."""
        return request in self._request_to_told

    def explain(self, request: Request) -> Miss | None:
        """Why a request that runs computes what it does; None if nobody asked, or nothing is new.

        Once when it first runs, and again when blocks that were to be loaded have failed.
        """
        gaps = request.found_gaps
        if self._request_to_told.get(request, gaps) is gaps:
            return None
        self._request_to_told[request] = gaps
        return self.history.explain(
            self._request_to_sent[request], gaps, by_choice=request.found_by_choice
        )

    def finish(self, request: Request, num_computed: int | None) -> None:
        """A request has ended, and so many leading tokens of it were computed; None: not all of its prompt.

        What it has left is remembered. The last token of an answer has no K/V.
        """
        sent = self._request_to_sent.pop(request, None)
        self._request_to_told.pop(request, None)
        claim = request.claim
        if sent is None or num_computed is None or claim is None or not claim.publishes:
            return
        self.history.remember(sent, num_computed)
