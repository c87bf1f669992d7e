"""Outputs of a chat as the deltas of a stream, and the message that they add up to."""

from collections.abc import Iterable
from dataclasses import dataclass

from kvkeep.engine import FinishReason, Piece
from kvkeep.server.call_syntax import CallSyntax
from kvkeep.server.openai_output import Json, logprob_entry, reported
from kvkeep.server.token_texts import TokenTexts
from kvkeep.server.tool_calls import ToolCall, ToolCallParser

__all__ = ["AnswerStyle", "ChatOutput", "MessageFold"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerStyle:
    """What a client wants to see of an output.

    `texts` are there where probabilities are asked for. With `syntax` calls of tools are looked for, at most
    `max_calls`.
    """

    texts: TokenTexts | None = None
    has_token_ids: bool = False
    syntax: CallSyntax | None = None
    max_calls: int | None = None


class ChatOutput:
    """One output of a chat: every piece of it becomes choices with a delta."""

    def __init__(self, index: int, style: AnswerStyle) -> None:
        self._index = index
        self._style = style
        self._parser = None
        if style.syntax is not None:
            self._parser = ToolCallParser(style.syntax, max_calls=style.max_calls)
        self._num_calls = 0
        self._has_begun = False

    def take(self, piece: Piece) -> list[Json]:
        """The choices that a piece adds to the stream; the last one of an output has its finish_reason."""
        choices = [] if self._has_begun else [self._choice({"role": "assistant", "content": ""})]
        self._has_begun = True
        deltas = [self._delta(part) for part in self._parts(piece)]
        extras = self._extras(piece)
        if extras and not deltas:
            deltas = [{"content": ""}]
        choices += [self._choice(delta) for delta in deltas]
        if extras:
            choices[-1] |= extras
        if piece.finish_reason is not None:
            choices.append(self._choice({}, self._finish_reason(piece.finish_reason)))
        return choices

    def _parts(self, piece: Piece) -> Iterable[str | ToolCall]:
        if self._parser is None:
            return [piece.text] if piece.text else []
        found = self._parser.feed(piece.text)
        return found if piece.finish_reason is None else [*found, *self._parser.finish()]

    def _delta(self, part: str | ToolCall) -> Json:
        if isinstance(part, str):
            return {"content": part}
        call = {
            "index": self._num_calls,
            "id": part.call_id,
            "type": "function",
            "function": {"name": part.name, "arguments": part.arguments},
        }
        self._num_calls += 1
        return {"tool_calls": [call]}

    def _extras(self, piece: Piece) -> Json:
        extras: Json = {}
        texts = self._style.texts
        if texts is not None and (sampled := reported(piece, texts)):
            content = [
                logprob_entry(one.token_id, one.logprob, texts)
                | {"top_logprobs": [logprob_entry(o.token_id, o.logprob, texts) for o in one.top]}
                for one in sampled
            ]
            extras["logprobs"] = {"content": content, "refusal": None}
        if self._style.has_token_ids and piece.token_ids:
            extras["token_ids"] = list(piece.token_ids)
        return extras

    def _finish_reason(self, reason: FinishReason) -> str:
        return "tool_calls" if self._num_calls and reason is FinishReason.STOP else reason.value

    def _choice(self, delta: Json, finish_reason: str | None = None) -> Json:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }


class MessageFold:
    """Adds up the choices of one output to the choice of an answer that is not streamed."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._texts: list[str] = []
        self._calls: list[Json] = []
        self._logprobs: list[Json] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None

    def add(self, choice: Json) -> None:
        """Take what ChatOutput.take gave."""
        delta = choice["delta"]
        self._texts.append(delta.get("content") or "")
        for call in delta.get("tool_calls", ()):
            self._calls.append({name: call[name] for name in ("id", "type", "function")})
        if choice["logprobs"] is not None:
            self._logprobs += choice["logprobs"]["content"]
        self._token_ids += choice.get("token_ids", ())
        self._finish_reason = choice["finish_reason"] or self._finish_reason

    def choice(self, style: AnswerStyle) -> Json:
        """The whole."""
        text = "".join(self._texts)
        message: Json = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            message |= {"content": text or None, "tool_calls": self._calls}
        logprobs = None
        if style.texts is not None:
            logprobs = {"content": self._logprobs, "refusal": None}
        choice = {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish_reason,
        }
        return choice | ({"token_ids": self._token_ids} if style.has_token_ids else {})
