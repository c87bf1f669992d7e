"""Checks of what is cached: of everything, or of what one tenant has."""

from kvkeep.cache import Selector, VerifyReport
from kvkeep.cache.slices import Bits
from kvkeep.llm import LLM
from kvkeep.server.cache_inspection import Question, inspection_of, query_of
from kvkeep.server.cache_scope import Scope

__all__ = ["verification"]


def verification(scope: Scope, *, tiers: bool) -> Question[VerifyReport]:
    """The question whether all is well with what somebody may see; with `tiers` all objects are read."""

    def check_all(llm: LLM) -> Bits[VerifyReport]:
        # Books are true as of one moment only.
        books = llm.cache.verify()
        yield
        return books + (yield from inspection_of(llm).audit()) if tiers else books

    def check_own(llm: LLM) -> Bits[VerifyReport]:
        query = query_of(llm, Selector(salts=scope.salts(None)))
        return (yield from inspection_of(llm).verify(query, tiers=tiers))

    return check_all if scope.sees_all else check_own
