"""Text and bytes of single tokens, for reports of probabilities."""

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["TokenTexts", "Vocabulary"]

_FIRST_FREE = 0x100
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


class Vocabulary(Protocol):
    """What is needed of a tokenizer; that of transformers is one."""

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that texts leave out."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Tokens that are written as they are, by id."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens by name."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str:
        """A token's name."""
        ...


class TokenTexts:
    """What single tokens stand for.

    A token may hold part of a character: then its bytes are exact and its text has U+FFFD. The texts of an
    output's tokens, special ones apart, add up to its text.
    """

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._written_out = self._special | frozenset(tokenizer.added_tokens_decoder)
        vocabulary = tokenizer.get_vocab()
        # Vocabularies of bytes have a letter for the line break; those of characters a name for its byte.
        is_of_bytes = "\u010a" in vocabulary and "<0x0A>" not in vocabulary
        self._letter_to_byte = _letters_of_bytes() if is_of_bytes else None

    def is_special(self, token_id: int) -> bool:
        """Whether texts leave the token out."""
        return token_id in self._special

    def raw(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        name = (
            self._tokenizer.convert_ids_to_tokens(token_id) or ""
        )  # none: the model's table is longer
        if token_id in self._written_out:
            return name.encode()
        if self._letter_to_byte is not None:
            return bytes(self._letter_to_byte.get(letter, 0x3F) for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode()

    def text(self, token_id: int) -> str:
        """The same as text."""
        return self.raw(token_id).decode("utf-8", "replace")


def _letters_of_bytes() -> dict[str, int]:
    """The letters that byte-level vocabularies write bytes with: themselves, or those from U+0100 on."""
    letters = {chr(byte): byte for byte in _PRINTABLE}
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return letters | {chr(_FIRST_FREE + place): byte for place, byte in enumerate(others)}
