"""Single tokens have the bytes they stand for, in vocabularies of both kinds."""

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from kvkeep.hf.load import load_model
from kvkeep.server.token_texts import TokenTexts, Vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's, whose vocabulary is of bytes."""
    found = load_model("tiny").tokenizer
    assert found is not None
    return found


@given(text=st.text(max_size=40))
def test_bytes_of_tokens_add_up_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Also where a character is spread over several tokens."""
    texts = TokenTexts(cast("Vocabulary", tokenizer))
    ids = tokenizer.encode(text, add_special_tokens=False)

    assert b"".join(map(texts.raw, ids)) == text.encode()


def test_special_tokens_are_known_and_named(tokenizer: PreTrainedTokenizerBase) -> None:
    """The end token is special, and its text is its name."""
    texts = TokenTexts(cast("Vocabulary", tokenizer))
    end = tokenizer.eos_token_id

    assert texts.is_special(end)
    assert texts.text(end) == tokenizer.eos_token
    assert not texts.is_special(tokenizer.encode("a")[0])


class _Pieces:
    """A vocabulary of characters with byte fallback, as SentencePiece makes them."""

    def __init__(self) -> None:
        self.all_special_ids = [0]
        self.added_tokens_decoder: dict[int, object] = {}
        self._names = ["</s>", "\u2581Hello", "<0xC3>", "<0xBC>", "\u010a", "<0x0A>"]

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names)}

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self._names[ids]


def test_byte_fallback_and_word_marks_are_read() -> None:
    """A mark is a space, a byte token its byte, and letters are themselves."""
    texts = TokenTexts(_Pieces())

    assert texts.text(1) == " Hello"
    assert texts.raw(2) + texts.raw(3) == "ü".encode()
    assert texts.raw(4) == "\u010a".encode()
    assert texts.raw(5) == b"\n"
