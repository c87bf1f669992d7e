"""Outputs of a plain completion as the choices of a stream, and the choice that they add up to."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvkeep.engine import Piece
from kvkeep.engine.sampler import Sampled
from kvkeep.server.openai_output import Json, logprob_entry, reported
from kvkeep.server.token_texts import TokenTexts

__all__ = ["CompletionFold", "CompletionOutput", "TextStyle"]

_LOGPROB_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextStyle:
    """What a client wants to see of an output: its prompt before it, probabilities, token ids."""

    echoed: str = ""
    texts: TokenTexts | None = None
    has_token_ids: bool = False


class CompletionOutput:
    """One output of one prompt: every piece of it becomes a choice."""

    def __init__(self, index: int, style: TextStyle, prompt_ids: Sequence[int]) -> None:
        self._index = index
        self._style = style
        self._prompt_ids = prompt_ids
        self._has_begun = False
        self._num_characters = 0  # of the texts of the tokens so far

    def take(self, piece: Piece) -> Json:
        """The choice that a piece adds to the stream."""
        text = piece.text if self._has_begun else self._style.echoed + piece.text
        choice: Json = {
            "index": self._index,
            "text": text,
            "logprobs": self._logprobs(piece),
            "finish_reason": None if piece.finish_reason is None else piece.finish_reason.value,
        }
        if self._style.has_token_ids:
            choice["token_ids"] = list(piece.token_ids)
            if not self._has_begun:
                choice["prompt_token_ids"] = list(self._prompt_ids)
        self._has_begun = True
        return choice

    def _logprobs(self, piece: Piece) -> Json | None:
        texts = self._style.texts
        if texts is None:
            return None
        found: Json = {name: [] for name in _LOGPROB_LISTS}
        for one in reported(piece, texts):
            entry = logprob_entry(one.token_id, one.logprob, texts)
            found["tokens"].append(entry["token"])
            found["token_logprobs"].append(entry["logprob"])
            found["top_logprobs"].append(_tops(one, texts))
            found["text_offset"].append(self._num_characters)
            self._num_characters += len(entry["token"])
        return found


class CompletionFold:
    """Adds up the choices of one output to the choice of an answer that is not streamed."""

    def __init__(self, index: int) -> None:
        self._choice: Json = {"index": index, "text": "", "logprobs": None, "finish_reason": None}
        self._texts: list[str] = []

    def add(self, choice: Json) -> None:
        """Take what CompletionOutput.take gave."""
        self._texts.append(choice["text"])
        for name in ("token_ids", "prompt_token_ids"):
            if name in choice:
                self._choice.setdefault(name, []).extend(choice[name])
        if choice["logprobs"] is not None:
            whole = self._choice["logprobs"] or {name: [] for name in _LOGPROB_LISTS}
            for name in _LOGPROB_LISTS:
                whole[name] += choice["logprobs"][name]
            self._choice["logprobs"] = whole
        self._choice["finish_reason"] = choice["finish_reason"] or self._choice["finish_reason"]

    def choice(self) -> Json:
        """The whole."""
        return self._choice | {"text": "".join(self._texts)}


def _tops(sampled: Sampled, texts: TokenTexts) -> Json:
    """The most likely tokens by their text; of two that share one the more likely stays."""
    found: Json = {}
    for one in sampled.top:
        entry = logprob_entry(one.token_id, one.logprob, texts)
        found.setdefault(entry["token"], entry["logprob"])
    return found
