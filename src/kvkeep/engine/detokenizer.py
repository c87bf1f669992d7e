"""Tokens become text while they are generated, and stop strings end it.

A token is not a piece of text: it may hold part of a character, and its text may depend on the
tokens around it. Text leaves here once no later token can change it:

    tokens ──> _TokenWindow ──> settled text ──> StopSearch ──> text in which no stop string begins
"""

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from kvkeep.engine.stop_search import StopSearch

__all__ = ["IncrementalDetokenizer", "TokenDecoder"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The name of a token that stands for one byte of UTF-8, in vocabularies with byte fallback.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The same for bytes that only follow others in a character.
_CONTINUATION_TOKEN = re.compile(r"<0x[89ABab][0-9A-Fa-f]>")
# The same for bytes that begin a character of several bytes.
_LEAD_TOKEN = re.compile(r"<0x[C-Fc-f][0-9A-Fa-f]>")
# Tokens that wait for their text to settle. Four times the longest character is enough for text;
# more would be held for broken bytes only.
_MAX_PENDING = 16
# Four tokens are at least four bytes: enough for a decoder that starts inside a character to be in
# step again.
_CONTEXT_AFTER_BROKEN_BYTES = 4
_CONTEXT_FROM_PROMPT = 8


class TokenDecoder(Protocol):
    """What is needed of a tokenizer; that of transformers is one."""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """Return a token's name in the vocabulary; of an id behind it None, or a LookupError."""
        ...


class IncrementalDetokenizer:
    """Turns the tokens of one output into text, piece by piece, and finds stop strings.

    Without stop strings the pieces add up to what the tokenizer decodes at once (special tokens
    skipped if they are to be, spaces as they are), as a continuation of the prompt's text; after a
    special token at the end of the prompt, as a text of its own. A piece never ends inside a character.
    Ids without a name, which models have whose table is longer than the vocabulary, have no text. Work per
    token is bounded.

    One exception: vocabularies with byte fallback decode a run of byte tokens as a whole or, if any
    byte is wrong, as U+FFFD for each. Text of a run leaves after 16 byte tokens, so a byte that is
    wrong later no longer undoes it.
    """

    def __init__(
        self,
        tokenizer: TokenDecoder,
        prompt_ids: Sequence[int] = (),
        *,
        stop_strings: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        context = prompt_ids[-_CONTEXT_FROM_PROMPT:]
        self._window = _TokenWindow(tokenizer, context, skip_special_tokens=skip_special_tokens)
        self._search = StopSearch(stop_strings)
        self._include_stop = include_stop
        self._pieces: list[str] = []
        self._stopped_by: str | None = None
        self._finished = False
        self._num_tokens = 0

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stopped_by

    @property
    def num_tokens(self) -> int:
        """Tokens taken; after a stop, those up to the one that completed the stop string."""
        return self._num_tokens

    def append(self, token_ids: Iterable[int], *, may_stop: bool = True) -> str:
        """Take tokens and return the text that is settled now, often none.

        Tokens behind the one that completed a stop string are not taken; see `num_tokens`. A stop string
        that is complete while it may not stop is text.
        """
        assert not self._finished
        pieces = []
        for token_id in token_ids:
            if self._stopped_by is not None:
                break
            self._num_tokens += 1
            settled = self._window.append(token_id)
            pieces.append(self._until_stop(settled) if may_stop else self._search.advance(settled))
        return self._give("".join(pieces))

    def finish(self) -> str:
        """Return the text that was held back; no token follows. A second call returns nothing."""
        if self._finished or self._stopped_by is not None:
            return ""
        self._finished = True
        piece = self._until_stop(self._window.finish())
        return self._give(piece + self._search.release())

    def _until_stop(self, settled: str) -> str:
        """Return what of the settled text can leave."""
        if self._search.is_empty:
            return settled
        # After a stop string no token follows, so whatever completes one is settled by that.
        found = self._search.find(settled + self._window.unsettled_text())
        if found is None:
            return self._search.advance(settled)
        self._stopped_by = found.stop_string
        self._search.release()
        return found.before + found.stop_string if self._include_stop else found.before

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece


class _TokenWindow:
    """The last tokens of a text: a context whose text is out, and pending tokens behind it.

    Decoders strip or add spaces at the start of a text, so pending tokens are decoded behind the
    context and its text is cut off.
    """

    def __init__(
        self, tokenizer: TokenDecoder, prompt_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        self._num_byte_tokens = 0  # in a row, at the end of the pending tokens
        self._num_given = 0  # characters of the pending tokens that are out
        self._context_text = ""
        self._start_behind(prompt_ids)

    def append(self, token_id: int) -> str:
        """Take a token and return the text that no later token can change."""
        if self._name(token_id) is None or (self._skips_special and self._is_special(token_id)):
            return ""
        self._pending.append(token_id)
        if self._is_named(_BYTE_TOKEN, token_id):
            self._num_byte_tokens += 1
            return self._cut_byte_run() if self._num_byte_tokens >= _MAX_PENDING else ""
        self._num_byte_tokens = 0
        text = self._pending_text(len(self._pending))
        # The start of a character shows as one U+FFFD at the end; those before it are final.
        settled = text.removesuffix(_REPLACEMENT)
        piece = settled[self._num_given :]
        self._num_given = len(settled)
        if settled == text:
            self._move_context(len(self._pending))
        elif len(self._pending) >= _MAX_PENDING:
            self._move_context_into_broken_bytes()
        return piece

    def unsettled_text(self) -> str:
        """Return the whole characters behind the settled text, if they were all."""
        if self._num_byte_tokens == 0:
            return ""
        text = self._pending_text(len(self._pending))[self._num_given :]
        return "" if _REPLACEMENT in text else text

    def finish(self) -> str:
        """Return the text that is not settled, as it is when no token follows."""
        return self._pending_text(len(self._pending))[self._num_given :]

    def _start_behind(self, prompt_ids: Sequence[int]) -> None:
        """Make the prompt's last tokens the context of the output's first."""
        for token_id in prompt_ids:
            if self._name(token_id) is None:
                continue
            if self._is_special(token_id):
                self._context.clear()
            else:
                self._context.append(token_id)
        # The window may begin inside a character, which would spoil a run of byte tokens.
        while self._context and self._is_named(_CONTINUATION_TOKEN, self._context[0]):
            self._context.pop(0)
        # So would the end, where the output completes a character: that one is the output's.
        for num_begun in range(1, min(4, len(self._context) + 1)):
            begun = self._context[-num_begun:]
            if not self._is_named(_BYTE_TOKEN, begun[0]):
                break
            if self._is_named(_LEAD_TOKEN, begun[0]):
                if self._decode(begun).endswith(_REPLACEMENT):
                    del self._context[-num_begun:]
                    self._pending, self._num_byte_tokens = begun, num_begun
                break
        self._context_text = self._decode(self._context).removesuffix(_REPLACEMENT)

    def _cut_byte_run(self) -> str:
        """Give out a long run of byte tokens up to its last whole character, or all if broken."""
        num_pending = len(self._pending)
        for length in range(num_pending, num_pending - 4, -1):
            text = self._pending_text(length)
            if _REPLACEMENT not in text:
                break
        else:
            length, text = num_pending, self._pending_text(num_pending)
        piece = text[self._num_given :]
        self._num_given = len(text)
        self._move_context(length)
        self._num_byte_tokens = len(self._pending)
        return piece

    def _move_context(self, length: int) -> None:
        """Make the first pending tokens, whose text is out, the context."""
        text = self._decode(self._pending[:length])
        # A context without text would leave the next token at the start, where spaces are stripped.
        if text:
            self._context, self._pending = self._pending[:length], self._pending[length:]
            self._context_text, self._num_given = text, 0

    def _move_context_into_broken_bytes(self) -> None:
        """Make the last pending tokens the context although they end inside a character."""
        self._context = self._pending[-_CONTEXT_AFTER_BROKEN_BYTES:]
        self._context_text = self._decode(self._context).removesuffix(_REPLACEMENT)
        self._pending, self._num_given = [], 0

    def _pending_text(self, length: int) -> str:
        """Return the text of the first pending tokens behind the context."""
        text = self._decode(self._context + self._pending[:length])
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        # A broken byte spoiled the run of byte tokens that the context is a part of.
        return self._decode(self._pending[:length])

    def _is_special(self, token_id: int) -> bool:
        """Whether decoding skips the token, so that it is no context either."""
        return not self._decode([token_id], skip_special_tokens=True) and bool(
            self._decode([token_id], skip_special_tokens=False)
        )

    def _is_named(self, pattern: re.Pattern[str], token_id: int) -> bool:
        return pattern.fullmatch(self._name(token_id) or "") is not None

    def _name(self, token_id: int) -> str | None:
        try:
            return self._tokenizer.convert_ids_to_tokens(token_id)
        except LookupError:
            return None

    def _decode(self, token_ids: list[int], *, skip_special_tokens: bool | None = None) -> str:
        skips = self._skips_special if skip_special_tokens is None else skip_special_tokens
        return self._tokenizer.decode(
            token_ids,
            skip_special_tokens=skips,
            clean_up_tokenization_spaces=False,
        )
