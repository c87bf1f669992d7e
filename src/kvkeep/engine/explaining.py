"""Why requests computed what they did: told to those that ask, from what was sent and given up lately."""

from kvkeep.cache import KVCache
from kvkeep.cache.explain import History, Miss, Sent
from kvkeep.scheduling import Request

__all__ = ["Explaining"]


class Explaining:
    """The history of one engine, kept while its requests come and go."""

    def __init__(self, cache: KVCache) -> None:
        self.history = History()
        cache.administration.tell_gone(self.history.note_gone)
        self._request_to_sent: dict[Request, Sent] = {}
        self._wanted: set[Request] = set()

    def add(self, request: Request, sent: Sent, *, is_wanted: bool) -> None:
        """A request has come; `is_wanted`: it wants to know why it has misses."""
        self._request_to_sent[request] = sent
        if is_wanted:
            self._wanted.add(request)

    def explain(self, request: Request) -> Miss | None:
        """Why a request that runs for the first time computes what it does; None if nobody asked."""
        if request not in self._wanted:
            return None
        self._wanted.discard(request)
        return self.history.explain(
            self._request_to_sent[request], request.found_gaps, by_choice=request.found_by_choice
        )

    def finish(self, request: Request, *, is_whole: bool) -> None:
        """A request has ended; what it has left is remembered if it was computed as a whole."""
        sent = self._request_to_sent.pop(request, None)
        self._wanted.discard(request)
        claim = request.claim
        if sent is not None and is_whole and claim is not None and claim.publishes:
            self.history.remember(sent)
