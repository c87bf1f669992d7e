"""The answer to a Responses request: pieces become output items, and the whole can be continued."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvkeep.cache import Receipt
from kvkeep.engine import FinishReason, Piece
from kvkeep.server.cache_fields import CacheFields
from kvkeep.server.cache_report import written_tokens
from kvkeep.server.errors import ApiError
from kvkeep.server.event_answers import EventAnswer, Parts
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_output import Json, logprob_entry, reported
from kvkeep.server.preparing import report_of
from kvkeep.server.responses_stream import ResponseWriter
from kvkeep.server.service import Job
from kvkeep.server.sse import KEEP_ALIVE
from kvkeep.server.token_texts import TokenTexts

__all__ = ["ResponseAnswer", "ResponseStyle"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseStyle:
    """How a response is written.

    `head` has the fields that do not change, `item_id` begins the ids of items. `texts` are there where
    probabilities are asked for. `max_calls`: the most calls of tools, None for any number.
    """

    head: Json
    item_id: str
    texts: TokenTexts | None
    max_calls: int | None


class ResponseAnswer(EventAnswer):
    """Makes the events of a response. `keep` gets the whole before its end is told."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        job: Job,
        style: ResponseStyle,
        *,
        fields: CacheFields,
        profile: ModelProfile,
        keep: Callable[[Json], None],
    ) -> None:
        self._job = job
        self._style = style
        self._fields = fields
        self._profile = profile
        self._keep = keep
        self._writer = ResponseWriter(style.head, style.item_id)
        self._parts = Parts(profile.call_syntax, max_calls=style.max_calls)

    def start(self) -> list[Json]:
        return self._writer.start()

    def take(self, piece: Piece) -> list[Json]:
        events = []
        logprobs = self._logprobs(piece)
        parts = self._parts.take(piece.text, is_last=piece.finish_reason is not None)
        # Probabilities of held text are told with the text.
        for part in parts or ("",):
            if isinstance(part, str):
                events += self._writer.say(part, logprobs)
                logprobs = []
            else:
                events += self._writer.call(part.call_id, part.name, part.arguments)
        if piece.receipt is not None:
            events += self._finish(piece, piece.receipt)
        return events

    def fail(self, error: ApiError) -> list[Json]:
        return self._writer.fail(error.message)

    def result(self) -> Json:
        return self._writer.response()

    def _finish(self, piece: Piece, receipt: Receipt) -> list[Json]:
        is_cut = piece.finish_reason is FinishReason.LENGTH and receipt.output_tokens > 0
        events = self._writer.finish(
            self._usage(receipt),
            completed_at=time.time(),
            incomplete="max_output_tokens" if is_cut else None,
            more=report_of(receipt, self._job, self._fields, self._profile),
        )
        self._keep(self._writer.response())
        return events

    def _usage(self, receipt: Receipt) -> dict[str, Any]:
        written = written_tokens(receipt, self._job.options, self._profile.block_size)
        return {
            "input_tokens": receipt.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": receipt.reused_tokens,
                "cache_write_tokens": written,
            },
            "output_tokens": receipt.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": receipt.prompt_tokens + receipt.output_tokens,
        }

    def _logprobs(self, piece: Piece) -> list[Json]:
        texts = self._style.texts
        if texts is None:
            return []
        return [
            logprob_entry(one.token_id, one.logprob, texts)
            | {"top_logprobs": [logprob_entry(o.token_id, o.logprob, texts) for o in one.top]}
            for one in reported(piece, texts)
        ]
