"""Finds stop strings in text that comes in pieces, in time proportional to the text, whatever they are."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["FoundStop", "StopSearch"]


@dataclass(frozen=True, slots=True)
class FoundStop:
    """The stop string that completes first, and the text before it that is not out yet."""

    before: str
    stop_string: str


class StopSearch:
    """Finds the stop string that completes first.

    First is what completes first, not what begins first: only that is the same however the text is cut into
    pieces.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._followers = [_Follower(one) for one in stop_strings]
        self._held = ""  # the end of the text so far, if a stop string may begin there

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to find."""
        return not self._followers

    def find(self, piece: str) -> FoundStop | None:
        """Look into the text with this piece behind it; of strings that end together the longest is found."""
        ends = [
            (end, -len(follower.text))
            for follower in self._followers
            if (end := follower.end_in(piece)) is not None
        ]
        if not ends:
            return None
        end_in_piece, minus_length = min(ends)
        text = self._held + piece
        end = len(self._held) + end_in_piece
        place = end + minus_length
        return FoundStop(text[:place], text[place:end])

    def advance(self, piece: str) -> str:
        """Add a piece; return the text in which no stop string begins. One that is complete is text."""
        for follower in self._followers:
            follower.advance(piece)
        text = self._held + piece
        num_held = max((follower.num_matched for follower in self._followers), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def release(self) -> str:
        """Return the held text; no text follows."""
        held, self._held = self._held, ""
        return held


class _Follower:
    """How much of one stop string the end of the text is: the search of Knuth, Morris and Pratt.

    `_borders[k]` is the longest proper beginning of the first k characters that also ends them. It grows with
    what has matched: of a long string that never fits nothing is computed.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = [0, 0]

    def end_in(self, piece: str) -> int | None:
        """Where in `piece` the string is complete first: the index behind its last character."""
        num_matched, at = self.num_matched, 0
        while at < len(piece):
            if not num_matched and (at := piece.find(self.text[0], at)) < 0:
                return None
            num_matched = self._grown(num_matched, piece[at])
            at += 1
            if num_matched == len(self.text):
                return at
        return None

    def advance(self, piece: str) -> None:
        """Add a piece to the text."""
        num_matched, at = self.num_matched, 0
        while at < len(piece):
            if not num_matched and (at := piece.find(self.text[0], at)) < 0:
                break
            num_matched = self._grown(num_matched, piece[at])
            at += 1
            if num_matched == len(self.text):
                num_matched = self._border(num_matched)
        self.num_matched = num_matched

    def _grown(self, num_matched: int, character: str) -> int:
        """What matches with this character behind what matched."""
        while self.text[num_matched] != character:
            if not num_matched:
                return 0
            num_matched = self._border(num_matched)
        return num_matched + 1

    def _border(self, length: int) -> int:
        borders = self._borders
        while len(borders) <= length:
            last = len(borders) - 1
            borders.append(self._grown(borders[last], self.text[last]))
        return borders[length]
