"""What in a text is likely to be another one at the next request: times, dates, ids, counters, ages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Pattern", "Sighting", "sightings"]

# What stands so many characters before a number says what the number is.
_CLUE_CHARS = 48
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DATE = (
    r"\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}[./]\d{1,2}[./]\d{4}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s+{_MONTH}\s+\d{{4}}\b|\b{_MONTH}\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b"
)
_NOW = r"now|today|current|time|clock|date|as of|generated|updated|timestamp"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A kind of text that changes.

    `clue` are words before it that make sure; None: it is sure by itself. With `needs_clue` it is passed over
    without such a word. `stays` is whether it is written once and stays as it is in a conversation's past, as
    the date of a message does.
    """

    what: str
    found: re.Pattern[str]
    clue: re.Pattern[str] | None
    needs_clue: bool
    stays: bool
    remedy: str


@dataclass(frozen=True, slots=True)
class Sighting:
    """A place in a text that a pattern matches; `is_sure` when a clue, or the pattern itself, says so."""

    pattern: Pattern
    start: int
    stop: int
    text: str
    is_sure: bool


def _pattern(
    what: str,
    found: str,
    remedy: str,
    *,
    clue: str | None = None,
    needs_clue: bool = True,
    stays: bool = True,
) -> Pattern:
    compiled = None if clue is None else re.compile(rf"\b(?:{clue})\b", re.IGNORECASE)
    return Pattern(what, re.compile(found, re.IGNORECASE), compiled, needs_clue, stays, remedy)


# In the order of their right: what an earlier one has found a later one does not report again.
_PATTERNS = (
    _pattern(
        "an id",
        r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b",
        "leave the id out of the text, or put it at the end of the newest message",
    ),
    _pattern(
        "a time",
        r"\b\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|\b)(?:[+-]\d{2}:?\d{2})?"
        r"|\b\d{1,2}:\d{2}:\d{2}\b(?:\s?[ap]\.?m\b)?",
        "put the time into the newest message, behind all that stays the same",
    ),
    _pattern(
        "a time",
        r"\b\d{1,2}:\d{2}\b(?:\s?[ap]\.?m\b)?",
        "put the time into the newest message, behind all that stays the same",
        clue=_NOW,
    ),
    _pattern(
        "a date",
        _DATE,
        "put the date into the newest message; in the system text it costs everything once a day",
        clue=_NOW,
        needs_clue=False,
    ),
    _pattern(
        "a timestamp",
        r"\b1[5-9]\d{8}(?:\d{3})?\b",
        "put the timestamp into the newest message, or leave it out",
        clue=r"time|timestamp|ts|epoch|now|at|since",
    ),
    _pattern(
        "an age",
        r"\b(?:\d+|an?)\s+(?:seconds?|minutes?|mins?|hours?|days?|weeks?)\s+ago\b",
        "write when it happened, not how long ago that is",
        stays=False,
    ),
    _pattern(
        "a counter",
        r"\b(?:turn|message|request|attempt|iteration|call)s?\s*(?:no\.?|number|count|#|:)*\s*\d+"
        r"\s*(?:/|of)\s*\d+\b"
        r"|\b(?:turn|message|request|attempt|iteration|call)s?\s*(?:no\.|number|count|#|:)\s*:?\s*\d+\b",
        "put the count at the end of the newest message, or leave it out",
        stays=False,
    ),
    _pattern(
        "a counter",
        r"\b\d[\d,._]*\s*(?:k\s*)?(?:tokens?|credits?|requests?)\s+(?:used|left|remaining|spent|so far)\b"
        r"|\b(?:used|left|remaining|spent|usage|budget)\b[^.\n]{0,24}?\d[\d,._]*\s*(?:k\s*)?(?:tokens?|credits?)\b"
        r"|\b(?:token usage|tokens used|tokens left|usage)\s*[:=]\s*\d[\d,._]*",
        "put what was used at the end of the newest message, or leave it out",
        stays=False,
    ),
    _pattern(
        "an id",
        r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{16,64}\b",
        "leave the id out of the text, or put it at the end of the newest message",
        clue=r"id|request|trace|span|session|run|nonce|cch|job|build",
    ),
    _pattern(
        "a random value",
        r"\b(?:nonce|cache[-_ ]?buster|random[-_ ]?seed|cch)\b[\"']?\s*[:=]\s*[\"']?\w+",
        "leave it out: all it does is keep text from being recognised",
    ),
)


def sightings(text: str) -> Iterator[Sighting]:
    """All that is likely to change, in no order; no two overlap."""
    taken: list[tuple[int, int]] = []
    for pattern in _PATTERNS:
        for match in pattern.found.finditer(text):
            start, stop = match.span()
            if any(start < other_stop and other_start < stop for other_start, other_stop in taken):
                continue
            before = text[max(0, start - _CLUE_CHARS) : start]
            is_sure = pattern.clue is None or pattern.clue.search(before) is not None
            if pattern.needs_clue and not is_sure:
                continue
            taken.append((start, stop))
            yield Sighting(pattern, start, stop, match[0], is_sure)
