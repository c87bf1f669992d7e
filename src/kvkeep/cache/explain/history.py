"""What was sent and what was given up lately, and from both why a request missed.

Bookkeeping of the thread that owns the cache. It keeps tokens of prompts, bounded in bytes, in memory only.
"""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import replace

from kvkeep.blocks import Namespace
from kvkeep.cache.explain.compare import TOKEN_BYTES, recurring_tokens, unpack_tokens
from kvkeep.cache.explain.gone import GoneKeys
from kvkeep.cache.explain.miss import Miss, MissType, Outline, Sent
from kvkeep.cache.explain.prompts import Earlier, PromptLog
from kvkeep.spec import BlockKey, Span

__all__ = ["History"]

_SYSTEM_ROLES = ("system", "developer")
# Prompts that are looked at closely: those that begin most like the new one.
_MOST_CANDIDATES = 4
# Tokens of a snippet, before the place where two prompts part and from there on.
_SNIPPET_BEFORE = 8
_SNIPPET_BEHIND = 24


class History:
    """Answers why tokens were computed; `explain` before `remember`, or a prompt is compared with itself."""

    def __init__(
        self,
        *,
        max_prompts: int = 256,
        max_bytes: int = 32 * 2**20,
        max_gone: int = 65_536,
    ) -> None:
        self._prompts = PromptLog(max_prompts=max_prompts, max_bytes=max_bytes)
        self._gone = GoneKeys(max_gone)

    def remember(self, sent: Sent, num_tokens: int | None = None) -> None:
        """Say that blocks of this prompt were published: of its first `num_tokens` tokens, all by default.

        The chain may have grown by the answer. Not for requests that leave nothing behind.
        """
        self._prompts.add(sent, len(sent.chain) if num_tokens is None else num_tokens)

    def note_gone(self, keys: Collection[BlockKey], reason: str) -> None:
        """Say that these blocks can no longer be had from anywhere, and why: a MissType or its text.

        Of blocks that are found all the same, in a tier for instance, nothing is said when explaining.
        """
        self._gone.note(keys, MissType(reason))

    def num_gone(self, reason: MissType) -> int:
        """Blocks that were given up for this reason since the start."""
        return self._gone.reason_to_count[reason]

    def sent(self, root: BlockKey) -> list[bytes]:
        """The packed tokens of the prompts of a namespace that are remembered, the newest first."""
        return self._prompts.packed(root)

    def forget(self, root: BlockKey | None, session: str | None = None) -> None:
        """Forget the prompts of a namespace (None: of all), or what only one session of it has sent."""
        self._prompts.forget(root, session)

    def explain(
        self, sent: Sent, gaps: Sequence[Span], *, by_choice: Collection[int] = ()
    ) -> Miss | None:
        """Why the gaps of a request had to be computed; None where nothing that was known was lost.

        `gaps` are as the request found them, before anything of it was computed. `by_choice` are the numbers
        of blocks that a tier had and that were quicker to compute. Changes nothing.
        """
        size = sent.chain.block_size
        if len(sent.chain) < size:
            return Miss(type=MissType.TOO_SHORT, missed_tokens=0)
        missing = _full_blocks(gaps, size, len(sent.chain.keys))
        if not missing:
            return None
        tokens = sent.chain.packed(0, len(sent.chain))
        alike = self._prompts.nearest(sent.chain.root, tokens, _MOST_CANDIDATES)
        num_sent_before = alike[0].num_common // size if alike else 0
        if not sent.reads:
            return Miss(type=MissType.DISABLED, missed_tokens=num_sent_before * size)
        lost = self._lost(sent, missing, by_choice, num_sent_before)
        if lost is not None:
            return lost
        last = None
        if sent.session is not None:
            last = self._prompts.of_session(sent.chain.root, sent.session, tokens)
        return self._changed(sent, missing, tokens, [last] if last is not None else alike)

    def _lost(
        self, sent: Sent, missing: Sequence[int], by_choice: Collection[int], num_sent_before: int
    ) -> Miss | None:
        """What is to be said when the text itself was there before, in so many leading blocks."""
        size, keys = sent.chain.block_size, sent.chain.keys
        reasons = [
            MissType.QUICKER_COMPUTED if number in by_choice else self._gone.reason(keys[number])
            for number in missing
        ]
        known = [number for number, reason in zip(missing, reasons, strict=True) if reason]
        first = next((reason for reason in reasons if reason), None)
        if first is None:
            known = [number for number in missing if number < num_sent_before]
            first = MissType.UNKNOWN
        if not known:
            return None
        return Miss(
            type=first,
            missed_tokens=len(known) * size,
            message_index=_message_at(sent.outline, known[0] * size),
        )

    def _changed(
        self, sent: Sent, missing: Sequence[int], tokens: bytes, candidates: Sequence[Earlier]
    ) -> Miss | None:
        """What is to be said when the text is another one, or is kept for others.

        `candidates` are the prompts to compare with: the session's last one, or those most alike.
        """
        size = sent.chain.block_size
        best: tuple[int, Earlier] | None = None
        for earlier in candidates:
            found = recurring_tokens(tokens, earlier.tokens, earlier.num_common)
            if found >= size and (best is None or found > best[0]):
                best = (found, earlier)
        if best is not None:
            return _divergence(sent, tokens, best[1], best[0])
        if missing[0] > 0:
            return None
        elsewhere = self._prompts.elsewhere(sent, tokens)
        if elsewhere is None:
            return Miss(type=MissType.FIRST_REQUEST, missed_tokens=0)
        changed = _namespace_change(sent.namespace, elsewhere.namespace)
        return Miss(type=changed, missed_tokens=elsewhere.num_common // size * size)


def _full_blocks(gaps: Sequence[Span], size: int, num_full: int) -> list[int]:
    """Numbers of the full blocks that lie in the gaps as a whole."""
    return [
        number
        for gap in gaps
        for number in range(-(-gap.start // size), min(gap.stop // size, num_full))
    ]


def _message_at(outline: Outline, position: int) -> int | None:
    """The message that a position belongs to; None before the first, or where they are not known."""
    index = bisect_right(outline.message_starts, position) - 1
    return index if index >= 0 else None


def _divergence(sent: Sent, tokens: bytes, earlier: Earlier, missed_tokens: int) -> Miss:
    at = earlier.num_common
    start, stop = max(0, at - _SNIPPET_BEFORE), at + _SNIPPET_BEHIND
    here, there = (
        packed[start * TOKEN_BYTES : stop * TOKEN_BYTES] for packed in (tokens, earlier.tokens)
    )
    return Miss(
        type=_change(sent.outline, earlier.outline, at),
        missed_tokens=missed_tokens,
        first_divergent_token=at,
        message_index=_message_at(sent.outline, at),
        snippet_start=start,
        cached_ids=unpack_tokens(there),
        sent_ids=unpack_tokens(here),
    )


def _change(sent: Outline, earlier: Outline, position: int) -> MissType:
    """Which part of the prompt is another one."""
    if _differ(sent.template, earlier.template):
        return MissType.TEMPLATE_CHANGED
    index = _message_at(sent, position)
    is_message = index is not None or not sent.message_starts
    role = sent.roles[index] if index is not None and index < len(sent.roles) else ""
    is_first_system = index == 0 and role in _SYSTEM_ROLES
    # Tools stand before the messages, or inside the first system message.
    if _differ(sent.tools, earlier.tools) and (not is_message or is_first_system):
        return MissType.TOOLS_CHANGED
    if role in _SYSTEM_ROLES or not is_message:
        return MissType.SYSTEM_CHANGED
    return MissType.MESSAGES_CHANGED


def _differ(one: bytes | None, other: bytes | None) -> bool:
    """Whether two digests differ, as far as both are known."""
    return one is not None and other is not None and one != other


def _namespace_change(sent: Namespace, earlier: Namespace) -> MissType:
    if sent.model != earlier.model or sent.positions != earlier.positions:
        return MissType.MODEL_CHANGED
    if replace(sent, salt="") != replace(earlier, salt=""):
        return MissType.CODEC_CHANGED
    return MissType.SALT_CHANGED
