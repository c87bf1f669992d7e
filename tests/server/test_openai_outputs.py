"""Pieces of an output become choices, and the choices add up to the answer, whatever the pieces hold."""

from typing import Any

import pytest

from kvkeep.engine import FinishReason, Piece
from kvkeep.engine.sampler import Sampled, TokenLogprob
from kvkeep.server.call_syntax import HermesSyntax
from kvkeep.server.errors import ApiError
from kvkeep.server.openai_chat_output import AnswerStyle, ChatOutput, MessageFold
from kvkeep.server.openai_output import failure_of
from kvkeep.server.token_texts import TokenTexts
from kvkeep.spec import RequestId


class _Letters:
    """A vocabulary of letters, with an end token and the two bytes of "ü"."""

    def __init__(self) -> None:
        self.all_special_ids = [0]
        self.added_tokens_decoder: dict[int, object] = {}
        self._names = ["</s>", "a", "b", "<0xC3>", "<0xBC>", "<0x0A>"]

    def get_vocab(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._names)}

    def convert_ids_to_tokens(self, ids: int) -> str:
        return self._names[ids]


def _piece(token_id: int, text: str, reason: FinishReason | None = None) -> Piece:
    return Piece(
        request_id=RequestId(1),
        choice=0,
        token_ids=(token_id,),
        text=text,
        sampled=(Sampled(token_id, -0.5, (TokenLogprob(token_id, -0.5),)),),
        finish_reason=reason,
    )


def _told(style: AnswerStyle, *pieces: Piece) -> list[dict[str, Any]]:
    output = ChatOutput(0, style)
    return [choice for piece in pieces for choice in output.take(piece)]


# "aü" and the end: the text of the second token comes with the third.
_PIECES = (_piece(1, "a"), _piece(3, ""), _piece(4, "ü"), _piece(0, "", FinishReason.STOP))


def test_a_token_without_text_of_its_own_is_reported() -> None:
    """Half a character has a probability and bytes, in a delta without text; the end token is left out."""
    choices = _told(AnswerStyle(texts=TokenTexts(_Letters())), *_PIECES)

    entries = [
        entry
        for choice in choices
        if choice["logprobs"] is not None
        for entry in choice["logprobs"]["content"]
    ]
    assert [entry["bytes"] for entry in entries] == [[97], [0xC3], [0xBC]]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {"content": ""},
        {"content": "ü"},
        {},
    ]
    assert choices[-1]["finish_reason"] == "stop"


def test_choices_add_up_to_the_answer() -> None:
    """Text, probabilities and token ids of all pieces, in order."""
    style = AnswerStyle(texts=TokenTexts(_Letters()), has_token_ids=True)
    fold = MessageFold(0)
    for choice in _told(style, *_PIECES):
        fold.add(choice)

    answer = fold.choice(style)

    assert answer["message"] == {"role": "assistant", "content": "aü", "refusal": None}
    assert answer["token_ids"] == [1, 3, 4, 0]
    assert len(answer["logprobs"]["content"]) == 3
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(FinishReason.STOP, "tool_calls"), (FinishReason.LENGTH, "length")],
)
def test_a_call_names_itself_as_the_reason_only_where_it_ended_the_answer(
    reason: FinishReason, expected: str
) -> None:
    """An answer that was cut off behind a call was cut off."""
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'

    choices = _told(AnswerStyle(syntax=HermesSyntax()), _piece(1, call), _piece(0, "", reason))

    assert choices[-1]["finish_reason"] == expected


def test_a_piece_without_anything_to_say_says_nothing() -> None:
    """Only the first one begins the answer."""
    assert len(_told(AnswerStyle(), _piece(3, ""))) == 1
    assert len(_told(AnswerStyle(), _piece(3, ""), _piece(3, ""))) == 1


@pytest.mark.parametrize(
    ("reason", "status"), [(FinishReason.ERROR, 500), (FinishReason.ABORT, 503)]
)
def test_an_output_that_was_given_up_is_an_error(reason: FinishReason, status: int) -> None:
    """A failed or stopped engine is never taken for the end of an answer."""
    found = failure_of(_piece(1, "", reason))

    assert isinstance(found, ApiError)
    assert found.status == status
