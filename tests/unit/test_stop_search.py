"""What a search for stop strings costs, and what it finds in text that repeats itself."""

import sys
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvkeep.engine.stop_search import StopSearch


def num_calls(stop_strings: Sequence[str], text: str) -> int:
    """Calls of functions, those written in C included, while `text` is searched, a character at a time."""
    search = StopSearch(stop_strings)
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        for character in text:
            search.find(character)
            search.advance(character)
    finally:
        sys.setprofile(None)
    return count


def test_work_grows_with_the_text_and_not_with_its_square() -> None:
    """One string holds all of the text back, others nearly fit at each of its ends."""
    stop_strings = ["a" * 5000 + "b", *(f"b{number}" + "a" * 5000 for number in range(4))]

    short, long = (num_calls(stop_strings, "a" * length) for length in (500, 1000))

    assert long < 2.2 * short


@given(
    stop_strings=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_the_same_is_found_as_in_the_whole_text(stop_strings: list[str], pieces: list[str]) -> None:
    """What begins a stop string is held, no more; the one that is complete first is found."""
    search = StopSearch(stop_strings)
    seen = out = ""
    for piece in pieces:
        whole = seen + piece
        ends = [(whole.index(one) + len(one), -len(one)) for one in stop_strings if one in whole]
        found = search.find(piece)
        if ends:
            end, minus_length = min(ends)
            assert found is not None
            assert found.stop_string == whole[end + minus_length : end]
            assert out + found.before == whole[: end + minus_length]
            return
        assert found is None
        seen, out = whole, out + search.advance(piece)
        begun = [
            length
            for one in stop_strings
            for length in range(len(one))
            if whole.endswith(one[:length])
        ]
        assert whole == out + whole[len(whole) - max(begun) :]
    assert out + search.release() == seen


def test_a_string_that_was_let_through_is_not_found_later() -> None:
    """Complete where it may not stop, it is text; where its end begins it again, that is held."""
    search = StopSearch(["aba"])

    assert search.advance("xaba") == "xab"
    found = search.find("ba")

    assert found is not None
    assert found.before == ""
    assert found.stop_string == "aba"
