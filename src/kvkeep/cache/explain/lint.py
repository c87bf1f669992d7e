"""The prompt doctor: what in a request will keep the next ones from using what it leaves behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from kvkeep.cache.explain.lint_pairs import Difference, differences
from kvkeep.cache.explain.lint_parts import Part, PartKind, parts_of
from kvkeep.cache.explain.lint_patterns import Sighting, sightings

__all__ = ["Finding", "Severity", "lint_request"]

# Of text without a tokenizer.
_CHARS_PER_TOKEN = 4
# A hit needs a whole block; so many tokens by default.
_BLOCK_TOKENS = 32
# Behind a changing part of the newest message, or of a plain prompt: passages, which others may share.
_LEAST_PASSAGE_TOKENS = 256
_MOST_OF_A_KIND = 3
_DATED_TEMPLATE = ("strftime_now", "date_string", "now()")
_SNIPPET_CHARS = 60


class Severity(StrEnum):
    """How sure it is that reuse suffers."""

    BREAKS = "breaks"
    MAY_BREAK = "may_break"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing to change in a request; `tokens_behind` are those that are computed again because of it."""

    where: str
    what: str
    why: str
    remedy: str
    severity: Severity
    tokens_behind: int


def lint_request(
    request: Mapping[str, object],
    count_tokens: Callable[[str], int] | None = None,
    *,
    earlier: Mapping[str, object] | None = None,
    template: str | None = None,
) -> list[Finding]:
    """What to change in a chat, completions, messages or responses request, the costliest first.

    `count_tokens` is the model's; without it four characters count as one. `earlier` is a request of the
    same program: what differs from it is certain where one request alone leaves doubt. `template` is the
    text of the model's chat template.
    """
    count = count_tokens or _estimate
    parts = parts_of(request)
    tokens = [count(part.text) for part in parts]
    findings = _switched_off(request, sum(tokens))
    for at, part in enumerate(parts):
        findings += _in_part(part, count, behind=sum(tokens[at + 1 :]))
    if earlier is not None:
        for difference in differences(parts_of(earlier), parts):
            behind = sum(tokens[difference.number + 1 :])
            findings += _in_pair(parts[difference.number], difference, count, behind=behind)
    if template is not None:
        findings += _in_template(template, parts, sum(tokens))
    return sorted(findings, key=lambda one: (one.severity, -one.tokens_behind))


def _estimate(text: str) -> int:
    return -(-len(text) // _CHARS_PER_TOKEN)


def _in_part(part: Part, count: Callable[[str], int], *, behind: int) -> list[Finding]:
    findings: list[Finding] = []
    num_of_kind: dict[str, int] = {}
    for one in sorted(sightings(part.text), key=lambda one: one.start):
        rest = count(part.text[one.stop :])
        if not _costs(part.kind, one, rest, behind):
            continue
        kind = one.pattern.what
        num_of_kind[kind] = num_of_kind.get(kind, 0) + 1
        if num_of_kind[kind] > _MOST_OF_A_KIND:
            continue
        is_fixed = part.kind is PartKind.FIXED or not one.pattern.stays
        severity = Severity.BREAKS if one.is_sure and is_fixed else Severity.MAY_BREAK
        tokens_behind = rest if part.kind in (PartKind.NEWEST, PartKind.WHOLE) else rest + behind
        findings.append(
            Finding(
                where=f"{part.where}, character {one.start}",
                what=f"{kind}: {one.text[:_SNIPPET_CHARS]!r}",
                why=_why(severity, tokens_behind),
                remedy=one.pattern.remedy,
                severity=severity,
                tokens_behind=tokens_behind,
            )
        )
    return findings


def _costs(kind: PartKind, one: Sighting, rest: int, behind: int) -> bool:
    """Whether so much text stands behind it that a change of it matters."""
    match kind:
        case PartKind.FIXED:
            # However little follows it now: all that a conversation adds follows it, too.
            return True
        case PartKind.PAST:
            # What was written into a message once is the same in all later requests.
            return not one.pattern.stays
        case PartKind.NEWEST | PartKind.WHOLE:
            return rest >= _LEAST_PASSAGE_TOKENS


def _why(severity: Severity, tokens_behind: int) -> str:
    when = "when it is another one" if severity is Severity.MAY_BREAK else "at every change of it"
    return f"about {tokens_behind} tokens behind it are computed again {when}{_few(tokens_behind)}"


def _few(num_tokens: int) -> str:
    """What to add where there is nothing to lose yet."""
    if num_tokens >= _BLOCK_TOKENS:
        return ""
    return (
        f"; that is less than a block ({_BLOCK_TOKENS} tokens by default), and a hit needs a whole one, but "
        "a longer conversation loses all that follows"
    )


def _in_pair(
    part: Part, difference: Difference, count: Callable[[str], int], *, behind: int
) -> list[Finding]:
    tokens_behind = count(part.text[difference.start :]) + behind
    return [
        Finding(
            where=f"{part.where}, character {difference.start}",
            what=difference.what,
            why=f"the earlier request has {difference.earlier_text!r} where this one has "
            f"{difference.text!r}: about {tokens_behind} tokens are computed again{_few(tokens_behind)}",
            remedy=difference.remedy,
            severity=Severity.BREAKS,
            tokens_behind=tokens_behind,
        )
    ]


def _in_template(template: str, parts: list[Part], num_tokens: int) -> list[Finding]:
    findings = []
    found = next((name for name in _DATED_TEMPLATE if name in template), None)
    if found is not None:
        findings.append(
            Finding(
                where="chat template",
                what=f"today's date ({found})",
                why=f"it stands before the messages: about {num_tokens} tokens are computed again every day",
                remedy="give a fixed date in chat_template_kwargs, or use a template without one",
                severity=Severity.MAY_BREAK,
                tokens_behind=num_tokens,
            )
        )
    thinking = [part for part in parts if part.kind is PartKind.PAST and "</think>" in part.text]
    if "</think>" in template and thinking:
        findings.append(
            Finding(
                where=thinking[0].where,
                what="an answer with its thinking",
                why="the template takes earlier thinking out, and what was computed with it is not found",
                remedy="send answers back without their thinking, and keep what stands before them as it is",
                severity=Severity.MAY_BREAK,
                tokens_behind=0,
            )
        )
    return findings


def _switched_off(request: Mapping[str, object], num_tokens: int) -> list[Finding]:
    options = request.get("kv_cache")
    options = options if isinstance(options, Mapping) else {}
    off = [f"kv_cache.{name}" for name in ("read", "write") if options.get(name) is False]
    if request.get("cache_prompt") is False:
        off.append("cache_prompt")
    findings = [
        Finding(
            where=where,
            what="the cache is switched off",
            why="nothing is reused"
            if where.endswith("read")
            else "nothing is kept for later requests",
            remedy=f"leave {where} out, or make it true",
            severity=Severity.BREAKS,
            tokens_behind=num_tokens,
        )
        for where in off
    ]
    for where, salt in (
        ("kv_cache.salt", options.get("salt")),
        ("cache_salt", request.get("cache_salt")),
    ):
        if isinstance(salt, str) and any(one.is_sure for one in sightings(salt)):
            findings.append(
                Finding(
                    where=where,
                    what=f"a salt that looks new every time: {salt[:_SNIPPET_CHARS]!r}",
                    why="requests of different salts share nothing",
                    remedy="give all requests that may share the same salt, one for each tenant",
                    severity=Severity.MAY_BREAK,
                    tokens_behind=num_tokens,
                )
            )
    return findings
