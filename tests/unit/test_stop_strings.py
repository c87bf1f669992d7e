"""Where stop strings end the text of an output."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.engine.detokenizer import IncrementalDetokenizer
from tests.tiny_tokenizers import (
    REPLACEMENT,
    TOKENIZERS,
    both_tokenizers,
    byte_fallback,
    byte_level,
    pieces_of,
    texts,
)


@both_tokenizers
@given(
    text=texts,
    stop_strings=st.lists(st.text(" abthe\n€😀", min_size=1, max_size=4), min_size=1, max_size=3),
    include_stop=st.booleans(),
    seed=st.integers(0, 99),
)
def test_text_ends_at_the_first_stop_string(
    name: str, text: str, stop_strings: list[str], include_stop: bool, seed: int
) -> None:
    """The cut is at the stop string that completes first, and no token behind it is taken."""
    tokenizer = TOKENIZERS[name]()
    token_ids = tokenizer.encode(text)
    whole = tokenizer.decode(token_ids)
    ends = [
        (whole.index(stop) + len(stop), -len(stop), stop) for stop in stop_strings if stop in whole
    ]
    end, _, stop = min(ends) if ends else (len(whole), 0, None)
    kept = whole[: end if include_stop or stop is None else end - len(stop)]

    for cuts in (None, random.Random(seed)):
        pieces, detokenizer = pieces_of(
            tokenizer, token_ids, stop_strings=stop_strings, include_stop=include_stop, cuts=cuts
        )

        assert "".join(pieces) == kept
        assert detokenizer.stopped_by == stop
        if stop is not None:
            taken = token_ids[: detokenizer.num_tokens]
            assert stop in tokenizer.decode(taken)
            assert stop not in tokenizer.decode(taken[:-1])


@both_tokenizers
def test_what_only_looks_like_a_stop_string_comes_out(name: str) -> None:
    """A beginning that is not completed leaves with the next text, or at the end."""
    tokenizer = TOKENIZERS[name]()
    detokenizer = IncrementalDetokenizer(tokenizer, stop_strings=["dog!"])

    first = detokenizer.append(tokenizer.encode("the dog"))
    second = detokenizer.append(tokenizer.encode("the dog")[1:])

    assert first == "the "
    assert second.startswith("dog")
    assert first + second + detokenizer.finish() == "the dog dog"
    assert detokenizer.finish() == ""
    assert detokenizer.stopped_by is None


def test_a_stop_string_of_byte_tokens_ends_the_text_at_once() -> None:
    """A line feed is a byte token in vocabularies with byte fallback; no token more is needed."""
    tokenizer = byte_fallback()
    token_ids = tokenizer.encode("dog\nthe")
    detokenizer = IncrementalDetokenizer(tokenizer, stop_strings=["\n"])

    text = detokenizer.append(token_ids[: token_ids.index(11) + 1])

    assert text == "dog"
    assert detokenizer.stopped_by == "\n"
    assert detokenizer.append(token_ids) == ""
    assert detokenizer.finish() == ""


def test_the_stop_string_that_completes_first_wins_in_one_chunk() -> None:
    """What begins first but completes later would win or not by how the text is cut."""
    tokenizer = byte_level()
    whole_word = tokenizer.encode("jumps the")[-1:]
    letters = [tokenizer.byte_ids[byte] for byte in b" the"]
    assert tokenizer.decode(whole_word) == " the"

    for token_ids in (whole_word, letters):
        pieces, detokenizer = pieces_of(tokenizer, token_ids, stop_strings=["the", "h"])

        assert "".join(pieces) == " t"
        assert detokenizer.stopped_by == "h"


@both_tokenizers
def test_an_unfinished_character_is_no_replacement_character(name: str) -> None:
    """A stop string of U+FFFD is not found in half a character, but in a broken one."""
    tokenizer = TOKENIZERS[name]()
    euro = [tokenizer.byte_ids[byte] for byte in "€".encode()]

    pieces, whole = pieces_of(tokenizer, euro, stop_strings=[REPLACEMENT])
    none, broken = pieces_of(tokenizer, euro[:1], stop_strings=[REPLACEMENT])

    assert "".join(pieces) == "€"
    assert whole.stopped_by is None
    assert "".join(none) == ""
    assert broken.stopped_by == REPLACEMENT


def test_a_stop_string_that_completes_at_the_end_is_cut_off() -> None:
    """The last text is searched too, and what was held for it does not leave."""
    tokenizer = byte_level()
    token_ids = [*tokenizer.encode("a"), tokenizer.byte_ids[0xFF]]

    pieces, detokenizer = pieces_of(tokenizer, token_ids, stop_strings=["a" + REPLACEMENT])

    assert "".join(pieces) == ""
    assert detokenizer.stopped_by == "a" + REPLACEMENT


@both_tokenizers
def test_a_stop_string_that_may_not_stop_is_text(name: str) -> None:
    """Nothing of it is lost, and the next one, which may begin before, ends the text."""
    tokenizer = TOKENIZERS[name]()
    detokenizer = IncrementalDetokenizer(tokenizer, stop_strings=["dog"])
    token_ids = tokenizer.encode("the dog the dog")

    pieces = [detokenizer.append([one], may_stop=False) for one in token_ids[:-1]]
    pieces.append(detokenizer.append(token_ids[-1:]))

    assert "".join(pieces) == "the dog the "
    assert detokenizer.stopped_by == "dog"
