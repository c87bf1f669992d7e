"""One answer in the form of /v1/responses: the events of its stream, and the response they add up to."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Event", "ResponseWriter"]

Event = dict[str, Any]  # any: JSON


class ResponseWriter:
    """Makes output items of an answer's text and tool calls; each call gives the events it causes.

    `response` has the fields that do not change; `item_id` begins the ids of the items.
    """

    def __init__(self, response: Mapping[str, Any], item_id: str) -> None:
        self._response: Event = {
            **response,
            "status": "in_progress",
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
        }
        self._item_id = item_id
        self._items: list[Event] = []
        self._text: list[str] = []  # of the message that is open; none is when this is empty
        self._logprobs: list[Event] = []
        self._untold: list[Event] = []  # logprobs of tokens whose text is not out yet
        self._num_events = 0

    @property
    def items(self) -> Sequence[Event]:
        """The items that are whole."""
        return self._items

    def start(self) -> list[Event]:
        """Begin the stream."""
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
        ]

    def say(self, text: str, logprobs: Sequence[Event] = ()) -> list[Event]:
        """Add text, and what is known of its tokens."""
        self._untold.extend(logprobs)
        if not text:
            return []
        events = [] if self._text else self._begin_message()
        told, self._untold = self._untold, []
        self._text.append(text)
        self._logprobs.extend(told)
        return [*events, self._in_part("response.output_text.delta", delta=text, logprobs=told)]

    def call(self, call_id: str, name: str, arguments: str) -> list[Event]:
        """Add the call of a tool; `arguments` is JSON."""
        events = self._close_message("completed")
        item = {
            "id": self._next_id("fc"),
            "type": "function_call",
            "call_id": call_id,
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
        done = item | {"arguments": arguments, "status": "completed"}
        place = {"item_id": item["id"], "output_index": len(self._items)}
        kind = "response.function_call_arguments"
        events += [
            self._event("response.output_item.added", item=item, output_index=len(self._items)),
            self._event(f"{kind}.delta", delta=arguments, **place),
            self._event(f"{kind}.done", arguments=arguments, name=name, **place),
            self._event("response.output_item.done", item=done, output_index=len(self._items)),
        ]
        self._items.append(done)
        return events

    def finish(
        self,
        usage: Mapping[str, Any],
        *,
        completed_at: float,
        incomplete: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> list[Event]:
        """End the response; `incomplete` says what cut it short, `more` are further fields of it."""
        status = "completed" if incomplete is None else "incomplete"
        events = self._close_message(status)
        self._response = {
            **self._response,
            **(more or {}),
            "status": status,
            "output": self._items,
            "usage": dict(usage),
            "completed_at": completed_at if incomplete is None else None,
            "incomplete_details": None if incomplete is None else {"reason": incomplete},
        }
        return [*events, self._event(f"response.{status}", response=self._response)]

    def fail(self, message: str) -> list[Event]:
        """End the response after an error of the server."""
        events = self._close_message("incomplete")
        error = {"code": "server_error", "message": message}
        failed = {"status": "failed", "output": self._items, "error": error}
        self._response = self._response | failed
        return [*events, self._event("response.failed", response=self._response)]

    def response(self) -> Event:
        """The response as far as it has come."""
        return self._response

    def _begin_message(self) -> list[Event]:
        item = self._message([], "in_progress")
        added = self._event("response.output_item.added", item=item, output_index=len(self._items))
        return [added, self._in_part("response.content_part.added", part=_part("", []))]

    def _close_message(self, status: str) -> list[Event]:
        if not self._text:
            return []
        text, logprobs = "".join(self._text), self._logprobs
        self._text, self._logprobs = [], []
        part = _part(text, logprobs)
        item = self._message([part], status)
        events = [
            self._in_part("response.output_text.done", text=text, logprobs=logprobs),
            self._in_part("response.content_part.done", part=part),
            self._event("response.output_item.done", item=item, output_index=len(self._items)),
        ]
        self._items.append(item)
        return events

    def _message(self, content: list[Event], status: str) -> Event:
        return {
            "id": self._next_id("msg"),
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _next_id(self, prefix: str) -> str:
        """The id of the item that is being written."""
        return f"{prefix}_{self._item_id}{len(self._items)}"

    def _in_part(self, kind: str, **fields: object) -> Event:
        """An event about the text of the open message, which has one part."""
        return self._event(
            kind,
            item_id=self._next_id("msg"),
            output_index=len(self._items),
            content_index=0,
            **fields,
        )

    def _event(self, kind: str, **fields: object) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def _part(text: str, logprobs: list[Event]) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
