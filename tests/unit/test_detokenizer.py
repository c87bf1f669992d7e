"""Text from tokens, piece by piece, against decoding everything at once."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvkeep.engine.detokenizer import IncrementalDetokenizer
from tests.tiny_tokenizers import (
    REPLACEMENT,
    TOKENIZERS,
    CountingTokenizer,
    both_tokenizers,
    byte_fallback,
    byte_level,
    pieces_of,
    texts,
)


class PaddedTokenizer:
    """A tokenizer that is asked for ids behind its vocabulary, and has no text for them."""

    def __init__(self, tokenizer: CountingTokenizer, error: type[Exception] | None) -> None:
        self._tokenizer = tokenizer
        self._error = error

    def decode(self, token_ids: list[int], **options: bool) -> str:
        assert all(token_id < self._tokenizer.size for token_id in token_ids)
        return self._tokenizer.decode(token_ids, **options)

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        if ids < self._tokenizer.size:
            return self._tokenizer.convert_ids_to_tokens(ids)
        if self._error is not None:
            raise self._error(ids)
        return None


def token_sequences(tokenizer: CountingTokenizer) -> st.SearchStrategy[list[int]]:
    """Return runs of any tokens, of lone bytes and of text."""
    any_token = st.integers(0, tokenizer.size - 1).map(lambda token_id: [token_id])
    lone_bytes = st.lists(st.sampled_from(tokenizer.byte_ids), max_size=6)
    special = st.just([tokenizer.size - 1])
    chunks = st.one_of(any_token, lone_bytes, special, texts.map(tokenizer.encode))
    return st.lists(chunks, max_size=12).map(lambda runs: [token for run in runs for token in run])


def longest_byte_run(tokenizer: CountingTokenizer, token_ids: Sequence[int]) -> int:
    """Return the length of the longest run of byte tokens; special tokens do not end one."""
    longest = run = 0
    for token_id in token_ids:
        if token_id != tokenizer.size - 1:
            run = run + 1 if token_id in tokenizer.byte_ids else 0
            longest = max(longest, run)
    return longest


@both_tokenizers
@given(chance=st.data(), skips=st.booleans())
def test_pieces_add_up_to_the_text(name: str, chance: st.DataObject, skips: bool) -> None:
    """Any tokens, broken bytes included, give what decoding at once gives, with special tokens or without."""
    tokenizer = TOKENIZERS[name]()
    token_ids = chance.draw(token_sequences(tokenizer))
    expected = tokenizer.decode(token_ids, skip_special_tokens=skips)
    # The documented exception: a long run of bytes is not undone by a later byte.
    undone = name == "byte_fallback" and longest_byte_run(tokenizer, token_ids) >= 16
    assume(not (undone and REPLACEMENT in expected))

    pieces, detokenizer = pieces_of(tokenizer, token_ids, skip_special_tokens=skips)

    assert "".join(pieces) == expected
    assert detokenizer.text == expected
    assert detokenizer.num_tokens == len(token_ids)


@both_tokenizers
@given(text=texts, prompt=texts, seed=st.integers(0, 99))
def test_no_piece_holds_part_of_a_character(name: str, text: str, prompt: str, seed: int) -> None:
    """Pieces of a real text hold no U+FFFD that is not in the text, whatever the chunks."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(text)

    pieces, _ = pieces_of(
        tokenizer, token_ids, prompt_ids=tokenizer.encode(prompt), cuts=random.Random(seed)
    )

    assert "".join(pieces).count(REPLACEMENT) == text.count(REPLACEMENT)


@both_tokenizers
@given(chance=st.data())
def test_output_continues_the_text_of_the_prompt(name: str, chance: st.DataObject) -> None:
    """Prompt and output decode together to the prompt's text and then the output's."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(chance.draw(texts) + chance.draw(texts))
    split = chance.draw(st.integers(0, len(token_ids)))
    prompt_ids, output_ids = token_ids[:split], token_ids[split:]
    whole_text = tokenizer.decode(token_ids)
    assume(REPLACEMENT not in whole_text)
    # Only the whole characters of the prompt are its text; the output completes the last one.
    beginnings = [
        tokenizer.decode(prompt_ids[: max(0, split - num_begun)]).rstrip(REPLACEMENT)
        for num_begun in range(4)
    ]
    prompt_text = max(filter(whole_text.startswith, beginnings), key=len)

    pieces, _ = pieces_of(tokenizer, output_ids, prompt_ids=prompt_ids)

    assert "".join(pieces) == whole_text[len(prompt_text) :]


@both_tokenizers
@pytest.mark.parametrize("error", [None, IndexError])
@given(chance=st.data())
def test_ids_without_a_name_have_no_text(
    name: str, error: type[Exception] | None, chance: st.DataObject
) -> None:
    """Among the tokens of the prompt and of the output they change nothing, inside characters neither."""
    tokenizer = TOKENIZERS[name]()
    padded = PaddedTokenizer(tokenizer, error)
    nameless = st.lists(st.integers(tokenizer.size, tokenizer.size + 9), max_size=2)
    prompt_ids = tokenizer.encode(chance.draw(texts))[-4:]
    token_ids = chance.draw(token_sequences(tokenizer))

    plain = IncrementalDetokenizer(tokenizer, prompt_ids)
    mixed = IncrementalDetokenizer(padded, [*prompt_ids, *chance.draw(nameless)])
    for token_id in token_ids:
        assert mixed.append(chance.draw(nameless)) == ""
        assert mixed.append([token_id]) == plain.append([token_id])

    assert mixed.finish() == plain.finish()


def test_output_behind_a_special_token_is_a_text_of_its_own() -> None:
    """An answer behind the end of a turn begins without the space that a word carries."""
    tokenizer = byte_fallback()
    words = tokenizer.encode("the dog")
    eos = tokenizer.size - 1

    own, _ = pieces_of(tokenizer, words, prompt_ids=[*words, eos])
    continued, _ = pieces_of(tokenizer, words, prompt_ids=words)

    assert "".join(own) == "the dog"
    assert "".join(continued) == " the dog"


@both_tokenizers
def test_text_leaves_early(name: str) -> None:
    """Plain words leave with their token."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode("the dog the dog")

    pieces, _ = pieces_of(tokenizer, token_ids)

    assert pieces[-1] == ""
    assert all(pieces[:-1])


def test_an_emoji_leaves_whole() -> None:
    """Four bytes in four tokens: nothing, nothing, nothing, the character."""
    tokenizer = byte_level()
    pieces, _ = pieces_of(tokenizer, [tokenizer.byte_ids[byte] for byte in "😂".encode()])

    assert pieces == ["", "", "", "😂", ""]


def test_a_broken_byte_does_not_hold_the_text_back() -> None:
    """A byte that can be no start of a character shows with the next token at the latest."""
    tokenizer = byte_level()
    broken = tokenizer.byte_ids[0xFF]
    pieces, _ = pieces_of(tokenizer, [broken, broken, broken, *tokenizer.encode("a")])

    assert pieces == ["", REPLACEMENT, REPLACEMENT, REPLACEMENT + "a", ""]


@pytest.mark.parametrize("text", ["नमस्ते" * 20, "😂" * 50])
def test_a_long_run_of_byte_tokens_leaves_in_parts(text: str) -> None:
    """A language without tokens of its own is streamed, in whole characters."""
    tokenizer = byte_fallback()
    token_ids = [tokenizer.byte_ids[byte] for byte in text.encode()]

    pieces, _ = pieces_of(tokenizer, token_ids)

    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 6


def test_the_context_may_begin_inside_a_run_of_byte_tokens() -> None:
    """A prompt that ends with many byte tokens does not spoil the output's."""
    tokenizer = byte_fallback()
    prompt_ids = tokenizer.encode("नमस्ते" * 3)
    output_ids = tokenizer.encode("नमdog")[1:]

    pieces, _ = pieces_of(tokenizer, output_ids, prompt_ids=prompt_ids)

    assert "".join(pieces) == "नमdog"


@both_tokenizers
@pytest.mark.parametrize("kind", ["text", "broken bytes", "special", "straddling"])
def test_work_per_token_is_bounded(name: str, kind: str) -> None:
    """Decoded tokens grow with the output, not with its square, whatever the tokens."""
    tokenizer = TOKENIZERS[name]()
    straddling = [byte for _ in range(400) for byte in "€".encode()][1:]
    token_ids = {
        "text": tokenizer.encode("the dog jumps " * 100),
        "broken bytes": [tokenizer.byte_ids[200]] * 1000,
        "special": [tokenizer.size - 1] * 1000,
        "straddling": [tokenizer.byte_ids[byte] for byte in straddling],
    }[kind]
    tokenizer.num_decoded = 0

    pieces_of(tokenizer, token_ids, stop_strings=["no such text"])

    assert tokenizer.num_decoded <= 80 * len(token_ids)


@pytest.mark.parametrize("num_broken", range(10, 20))
def test_a_character_behind_many_broken_bytes_is_whole(num_broken: int) -> None:
    """Where the window moves among broken bytes, it stays in step with the characters."""
    tokenizer = byte_level()
    token_ids = [tokenizer.byte_ids[byte] for byte in b"\xff" * num_broken + "€".encode()]

    pieces, _ = pieces_of(tokenizer, token_ids)

    assert "".join(pieces) == REPLACEMENT * num_broken + "€"


def test_a_broken_byte_behind_a_whole_character_shows_as_itself() -> None:
    """A run of byte tokens is broken by its last byte; the part that is out stays as it is."""
    tokenizer = byte_fallback()
    euro = [tokenizer.byte_ids[byte] for byte in "€".encode()]
    letters = [tokenizer.tokenizer.get_vocab()[letter] for letter in "dog"]
    broken = [tokenizer.byte_ids[0xFF], *letters]

    behind_prompt, _ = pieces_of(tokenizer, broken, prompt_ids=euro)
    behind_output, _ = pieces_of(tokenizer, euro * 6 + broken)

    assert "".join(behind_prompt) == REPLACEMENT + "dog"
    assert "".join(behind_output).startswith("€€€€€" + REPLACEMENT)


class LeadingSpaceStripper:
    """A tokenizer of characters whose decoder strips all spaces at the start of a text."""

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> str:
        """Return the text of tokens."""
        assert skip_special_tokens or not clean_up_tokenization_spaces
        return "".join(map(chr, token_ids)).lstrip(" ")

    def convert_ids_to_tokens(self, ids: int) -> str:
        """Return a token's name."""
        return chr(ids)


def test_spaces_between_words_are_no_start_of_a_text() -> None:
    """Tokens of nothing but spaces are no context: behind them, more spaces would be stripped."""
    detokenizer = IncrementalDetokenizer(LeadingSpaceStripper())
    text = "two   words"

    assert detokenizer.append(map(ord, text)) == text
