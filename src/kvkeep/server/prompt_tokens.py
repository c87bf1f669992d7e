"""Text to token ids, with the way back from a character to its token."""

from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["EncodedText", "TextTokenizer", "text_tokenizer"]

# A character that belongs to no token is white space that was trimmed; the next token begins soon.
_MAX_TRIMMED = 8


class EncodedText(Protocol):
    """Tokens of a text."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids, in order."""
        ...

    def token_at(self, character: int) -> int:
        """The token that holds a character of the text, or one before it where that cannot be told."""
        ...


class TextTokenizer(Protocol):
    """What PromptEncoder needs of a tokenizer; may be used by several threads at once."""

    def encode(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        """Tokens of `text`, with what the tokenizer puts around a text if asked for."""
        ...


def text_tokenizer(tokenizer: Any) -> TextTokenizer:  # noqa: ANN401  transformers has no type for both kinds
    """The quickest way to encode with a tokenizer of transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Some files ask for truncation or padding, which transformers switches off in every call.
    if backend is None or backend.truncation is not None or backend.padding is not None:
        return _SlowTokenizer(tokenizer)
    return _FastTokenizer(backend)


class _FastTokenizer:
    """The Rust tokenizer itself: without the lock-like changes of state that transformers makes around it."""

    def __init__(self, backend: Any) -> None:  # noqa: ANN401  tokenizers.Tokenizer, which only hf may name
        self._backend = backend

    def encode(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        return _FastEncoding(self._backend.encode(text, add_special_tokens=add_special_tokens))


class _FastEncoding:
    def __init__(self, encoding: Any) -> None:  # noqa: ANN401  tokenizers.Encoding
        self._encoding = encoding
        self.ids: Sequence[int] = encoding.ids

    def token_at(self, character: int) -> int:
        for place in range(character, character + _MAX_TRIMMED):
            token = self._encoding.char_to_token(place)
            if token is not None:
                return int(token)
        return max(0, len(self.ids) - 1)


class _SlowTokenizer:
    """Through transformers; where a character lies is not known, which counts as the beginning."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401  one of transformers
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return _SlowEncoding(list(ids))


class _SlowEncoding:
    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids

    def token_at(self, character: int) -> int:
        del character
        return 0
