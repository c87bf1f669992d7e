"""One answer in Anthropic's form: the events of its stream, and the message they add up to."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvkeep.cache.explain.miss import Miss, MissType
from kvkeep.engine import FinishReason, Piece

__all__ = [
    "Event",
    "MessageUsage",
    "MessageWriter",
    "StopSequences",
    "diagnostics_of",
    "stop_reason",
]

Event = dict[str, Any]  # any: JSON

_HOUR_S = 3600.0
# Reasons that the protocol has a name for.
_CHANGES = frozenset(
    {
        MissType.MODEL_CHANGED,
        MissType.SYSTEM_CHANGED,
        MissType.TOOLS_CHANGED,
        MissType.MESSAGES_CHANGED,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageUsage:
    """What a message cost, in tokens. The protocol counts those read and written apart from the input.

    `ttl_s` is the lifetime of what was written, None where the settings of the server say.
    """

    prompt_tokens: int
    read_tokens: int = 0
    written_tokens: int = 0
    output_tokens: int = 0
    ttl_s: float | None = None

    def counts(self) -> dict[str, int]:
        """The counts that a stream's last event has too."""
        return {
            "input_tokens": self.prompt_tokens - self.read_tokens - self.written_tokens,
            "cache_creation_input_tokens": self.written_tokens,
            "cache_read_input_tokens": self.read_tokens,
            "output_tokens": self.output_tokens,
        }

    def fields(self) -> dict[str, Any]:
        """All counts of a message. What is kept without an end counts as written for the hour."""
        is_short = self.ttl_s is not None and self.ttl_s < _HOUR_S
        short, long = (self.written_tokens, 0) if is_short else (0, self.written_tokens)
        creation = {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long}
        return self.counts() | {"cache_creation": creation, "service_tier": "standard"}


class StopSequences:
    """Takes the stop sequence off the end of an answer and remembers which it was.

    The engine is asked to leave it there (`include_stop`), since the protocol reports it; the engine
    gives out no part of one before it is whole, so that it lies in the last piece.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        # Of those that complete at once the engine takes the longest.
        self._longest_first = sorted(sequences, key=len, reverse=True)
        self.found: str | None = None

    def cut(self, piece: Piece) -> str:
        """The text of a piece, without the stop sequence that ends it."""
        if piece.finish_reason is None:
            return piece.text
        for sequence in self._longest_first:
            if piece.text.endswith(sequence):
                self.found = sequence
                return piece.text.removesuffix(sequence)
        return piece.text


class MessageWriter:
    """Makes content blocks of an answer's text and tool calls; each call gives the events it causes."""

    def __init__(self, message_id: str, model: str) -> None:
        self._message: Event = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._blocks: list[Event] = []
        self._text: list[str] = []  # of the block that is open; none is when this is empty
        self.has_calls = False

    def start(self, usage: MessageUsage, more: Mapping[str, Any] | None = None) -> list[Event]:
        """Begin the stream; `more` are further fields of the message."""
        message = {**self._message, "usage": usage.fields(), **(more or {})}
        return [{"type": "message_start", "message": message}]

    def say(self, text: str) -> list[Event]:
        """Add text."""
        if not text:
            return []
        events = [] if self._text else [self._begin({"type": "text", "text": ""})]
        self._text.append(text)
        return [*events, self._delta({"type": "text_delta", "text": text})]

    def call(self, call_id: str, name: str, arguments: str) -> list[Event]:
        """Add the call of a tool. Where `arguments` is not a JSON object it stays the text that it was."""
        given = _object_of(arguments)
        if given is None:
            return self.say(f"{name}({arguments})")
        self.has_calls = True
        block: Event = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        events = [
            *self._close_text(),
            self._begin(block),
            self._delta({"type": "input_json_delta", "partial_json": arguments}),
            self._end(),
        ]
        self._blocks.append(block | {"input": given})
        return events

    def finish(
        self,
        reason: str,
        sequence: str | None,
        usage: MessageUsage,
        more: Mapping[str, Any] | None = None,
    ) -> list[Event]:
        """End the message: `reason` is what the protocol calls it, `sequence` the one that stopped it.

        `more` are further fields, of the message and of the event that ends it.
        """
        events = self._close_text()
        more = more or {}
        end = {"stop_reason": reason, "stop_sequence": sequence}
        self._message |= {**end, "usage": usage.fields(), "content": self._blocks, **more}
        return [
            *events,
            {"type": "message_delta", "delta": end, "usage": usage.counts(), **more},
            {"type": "message_stop"},
        ]

    def message(self) -> Event:
        """The message as far as it has come."""
        return self._message

    def _close_text(self) -> list[Event]:
        if not self._text:
            return []
        event = self._end()
        self._blocks.append({"type": "text", "text": "".join(self._text)})
        self._text = []
        return [event]

    def _begin(self, block: Event) -> Event:
        return {"type": "content_block_start", "index": len(self._blocks), "content_block": block}

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks), "delta": delta}

    def _end(self) -> Event:
        return {"type": "content_block_stop", "index": len(self._blocks)}


def diagnostics_of(miss: Miss | None, *, num_computed: int, block_size: int) -> Event | None:
    """The field `diagnostics`: what kept a prompt from being read as far as it could be.

    None when all but its end was. `miss` is what is known of the reason.
    """
    if miss is None and num_computed <= block_size:
        return None
    if miss is None:
        return {"cache_miss_reason": {"type": "unavailable"}}
    if miss.type in _CHANGES:
        reason = {"type": miss.type.value, "cache_missed_input_tokens": miss.missed_tokens}
        return {"cache_miss_reason": reason}
    is_first = miss.type is MissType.FIRST_REQUEST
    kind = "previous_message_not_found" if is_first else "unavailable"
    return {"cache_miss_reason": {"type": kind}}


def _object_of(written: str) -> dict[str, Any] | None:
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def stop_reason(
    reason: FinishReason, *, stopped_by: str | None, has_calls: bool, is_out_of_context: bool
) -> str:
    """Why an answer ended, in the words of the protocol."""
    if stopped_by is not None:
        return "stop_sequence"
    if reason is FinishReason.LENGTH:
        return "model_context_window_exceeded" if is_out_of_context else "max_tokens"
    return "tool_use" if has_calls else "end_turn"
