"""Why a request was not served from the cache, and what in a request keeps others from it."""

from kvkeep.cache.explain.compare import unpack_tokens
from kvkeep.cache.explain.history import History
from kvkeep.cache.explain.lint import Finding, Severity, lint_request
from kvkeep.cache.explain.lint_parts import PROMPT_FIELDS
from kvkeep.cache.explain.miss import Miss, MissType, Outline, Sent

__all__ = [
    "PROMPT_FIELDS",
    "Finding",
    "History",
    "Miss",
    "MissType",
    "Outline",
    "Sent",
    "Severity",
    "lint_request",
    "unpack_tokens",
]
