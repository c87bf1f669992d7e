"""Conversations written from texts that stay the same: what a session sends next, and where it turns.

Prose is the project's licence, code is that of the standard library.
"""

import asyncio
import email
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

__all__ = ["KINDS", "Author", "Message", "Sent"]

Message = dict[str, str]

_PROSE = Path(__file__).resolve().parents[1] / "LICENSE"
_CODE_BASES = (asyncio, email)
# Characters, from a line to a few pages.
_MOST_CODE = 20_000
_SHORT, _LONG = (40, 400), (400, 4000)


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a session, and its answer. `is_turn`: about something else than the one before."""

    messages: tuple[Message, ...]
    answer: str
    is_turn: bool = False


class Author:
    """Draws texts for the conversations of one application, which share its system prompt."""

    def __init__(self, seed: object) -> None:
        self._random = Random(str(seed))
        self._paragraphs = _PROSE.read_text(encoding="utf-8").split("\n\n")
        self.system = self.text(200, 8000)

    def text(self, least: int, most: int) -> str:
        """Paragraphs of together so many characters."""
        found, wanted = "", self._random.randint(least, most)
        while len(found) < wanted:
            found += self._random.choice(self._paragraphs) + "\n\n"
        return found[:wanted]

    def count(self, least: int, most: int) -> int:
        """A number between the two."""
        return self._random.randint(least, most)

    def code(self, base: int) -> str:
        """Some files of one of two code bases, always in the same order."""
        (folder,) = _CODE_BASES[base].__path__
        paths = [
            path for path in sorted(Path(folder).glob("*.py")) if path.stat().st_size < _MOST_CODE
        ]
        chosen = sorted(self._random.sample(paths, self.count(2, 4)))
        return "\n\n".join(f"# {path.name}\n{path.read_text(encoding='utf-8')}" for path in chosen)

    def asked(self) -> Message:
        """A message of the user."""
        return _user(self.text(*(_LONG if self.count(1, 4) == 1 else _SHORT)))


Write = Callable[[Author], Iterator[Sent]]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _told(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _talk(author: Author, begun: Sequence[Message], *, is_turn: bool = False) -> Iterator[Sent]:
    """A chat that grows behind `begun`."""
    messages = list(begun)
    for number in range(author.count(2, 8)):
        messages.append(author.asked())
        answer = author.text(*_LONG)
        yield Sent(tuple(messages), answer, is_turn=is_turn and number == 0)
        messages.append(_told(answer))


def _grown(author: Author) -> Iterator[Sent]:
    return _talk(author, [_system(author.system)])


def _edited(author: Author) -> Iterator[Sent]:
    """Every other message is sent again with another end, and the chat goes on behind that."""
    messages = [_system(author.system)]
    for _ in range(author.count(2, 8)):
        messages.append(author.asked())
        answer = author.text(*_LONG)
        yield Sent(tuple(messages), answer)
        if author.count(0, 1):
            text = messages[-1]["content"]
            messages[-1] = _user(text[: len(text) // 2] + author.text(*_SHORT))
            answer = author.text(*_LONG)
            yield Sent(tuple(messages), answer)
        messages.append(_told(answer))


def _thinking(author: Author) -> Iterator[Sent]:
    """What the model thought is not sent back."""
    for sent in _talk(author, [_system(author.system)]):
        thought = f"<think>\n{author.text(*_LONG)}\n</think>\n\n"
        yield Sent(sent.messages, thought + sent.answer)


def _cut(author: Author) -> Iterator[Sent]:
    """The system prompt and the last four messages are sent, not those before."""
    for sent in _talk(author, [_system(author.system)]):
        yield Sent((sent.messages[0], *sent.messages[1:][-5:]), sent.answer)


def _dated(author: Author) -> Iterator[Sent]:
    """The system prompt begins with the minute."""
    for minute, sent in enumerate(_talk(author, [_system(author.system)])):
        dated = _system(f"It is 2026-05-04, 11:{10 + 3 * minute}. {author.system}")
        yield Sent((dated, *sent.messages[1:]), sent.answer)


def _retrieved(author: Author) -> Iterator[Sent]:
    """Each question finds another document, which stands between the system prompt and the chat."""
    for sent in _talk(author, [_system(author.system)]):
        found = _user(f"Document:\n{author.text(2000, 8000)}")
        yield Sent((sent.messages[0], found, *sent.messages[1:]), sent.answer)


def _titled(author: Author) -> Iterator[Sent]:
    """Behind the first answer a title is asked for, by another prompt in the same session."""
    for number, sent in enumerate(_talk(author, [_system(author.system)])):
        yield sent
        if number == 0:
            title = f"Give this conversation a title of five words:\n{sent.answer[:300]}"
            yield Sent((_user(title),), author.text(10, 40))


def _subjects(author: Author) -> Iterator[Sent]:
    """Chats about other things, one behind the other, under one system prompt."""
    for number in range(author.count(2, 4)):
        yield from _talk(author, [_system(author.system)], is_turn=number > 0)


def _code_bases(author: Author) -> Iterator[Sent]:
    """Work on one code base, on another one, and on the first again where it was left."""
    bases = [_user(author.code(base)) for base in range(2)]
    yield from _talk(author, [_system(author.system), bases[0]])
    yield from _talk(author, [_system(author.system), bases[1]], is_turn=True)
    yield from _talk(author, [_system(author.system), bases[0]], is_turn=True)


KINDS: dict[str, Write] = {
    "chat that grows": _grown,
    "message edited": _edited,
    "thinking not sent back": _thinking,
    "oldest messages cut": _cut,
    "minute in the system prompt": _dated,
    "document replaced": _retrieved,
    "title asked in between": _titled,
    "other subjects": _subjects,
    "two code bases": _code_bases,
}
