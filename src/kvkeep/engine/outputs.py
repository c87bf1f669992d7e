"""What an engine gives back: pieces while it runs, outputs when it is done."""

from dataclasses import dataclass
from enum import StrEnum

from kvkeep.cache import Receipt
from kvkeep.engine.sampler import Sampled
from kvkeep.spec import RequestId

__all__ = ["Choice", "FinishReason", "Output", "Piece"]


class FinishReason(StrEnum):
    """Why an output ended."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the longest context
    ABORT = "abort"  # the caller's wish
    ERROR = "error"  # the model failed, or its logits could not be sampled


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one step adds to one output; the last piece of an output has a `finish_reason`.

    `text` holds whole characters only, so it can lag behind `token_ids`. The first piece of a request says
    how many of its prompt tokens were reused, which a stream can tell before its end. `failure` is why an
    output ended with ERROR, where a grammar can say it.
    """

    request_id: RequestId
    choice: int
    token_ids: tuple[int, ...]
    text: str
    sampled: tuple[Sampled, ...] = ()
    finish_reason: FinishReason | None = None
    failure: str | None = None
    reused_tokens: int | None = None
    receipt: Receipt | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One finished output; `sampled` has its logprobs where they were asked for."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """All outputs of one prompt and what they cost; the properties are those of the first."""

    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    receipt: Receipt

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens of the first output."""
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first output."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first output ended."""
        return self.choices[0].finish_reason
