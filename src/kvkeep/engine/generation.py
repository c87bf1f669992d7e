"""One prompt on its way through the engine: its outputs, what ends them, and what they cost."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from time import perf_counter

from kvkeep.cache import Receipt
from kvkeep.cache.explain import Miss
from kvkeep.config import SamplingParams
from kvkeep.engine.detokenizer import IncrementalDetokenizer, TokenDecoder
from kvkeep.engine.outputs import FinishReason, Piece
from kvkeep.engine.sampler import Sampled, SampleRow
from kvkeep.planning import DEVICE
from kvkeep.scheduling import Request
from kvkeep.spec import RequestId

__all__ = ["EndTokens", "Generation", "OutputStream"]


@dataclass(frozen=True, slots=True)
class EndTokens:
    """What ends an output: the model's end tokens and the longest context in tokens."""

    eos_ids: Collection[int]
    max_context: int


class OutputStream:
    """One output: the request that computes it, how its tokens are chosen, and its text.

    `first` is the first output of the same prompt, if this is another.
    """

    def __init__(
        self,
        request: Request,
        choice: int,
        prompt_ids: Sequence[int],
        tokenizer: TokenDecoder | None,
        end: EndTokens,
        *,
        first: "OutputStream | None" = None,
    ) -> None:
        self.request = request
        self.choice = choice
        self.output_ids: list[int] = []
        self._end = end
        self.row: SampleRow = SampleRow.start(
            request.params,
            prompt_ids,
            self.output_ids,
            choice=choice,
            eos_ids=end.eos_ids,
            first=None if first is None else first.row,
        )
        self.finish_reason: FinishReason | None = None
        self._text = None
        if tokenizer is not None:
            self._text = IncrementalDetokenizer(
                tokenizer,
                prompt_ids,
                stop_strings=request.params.stop_strings,
                include_stop=request.params.include_stop,
                skip_special_tokens=request.params.skip_special_tokens,
            )

    def accept(self, sampled: Sampled) -> str:
        """Take the next token; returns the text that is complete now."""
        self.output_ids.append(sampled.token_id)
        text = "" if self._text is None else self._text_of(sampled.token_id, self._text)
        self.finish_reason = self._why_finished(sampled.token_id)
        if self.finish_reason is not None and self._text is not None:
            text += self._text.finish()
        return text

    def finish(self, reason: FinishReason) -> str:
        """End the output from outside; returns the text held back until now."""
        self.finish_reason = reason
        return "" if self._text is None else self._text.finish()

    def _text_of(self, token_id: int, text: IncrementalDetokenizer) -> str:
        params = self.request.params
        if token_id in self.row.end_ids and not params.skip_special_tokens:
            return ""
        return text.append([token_id], may_stop=len(self.output_ids) >= params.min_tokens)

    def _why_finished(self, token_id: int) -> FinishReason | None:
        params = self.request.params
        if token_id in self.row.end_ids:
            return FinishReason.STOP
        if self._text is not None and self._text.stopped_by is not None:
            return FinishReason.STOP
        num_tokens = self.request.num_prompt + len(self.output_ids)
        if len(self.output_ids) >= params.max_tokens or num_tokens >= self._end.max_context:
            return FinishReason.LENGTH
        return None


class Generation:
    """All outputs of one prompt. The first one computes the prompt, the others fork from it."""

    def __init__(self, request_id: RequestId, first: OutputStream) -> None:
        self.request_id = request_id
        self.outputs = [first]
        self.num_expected = first.request.params.n if first.request.params.max_tokens else 1
        self._started_s = perf_counter()
        self._queue_s: float | None = None
        self._first_token_s: float | None = None
        self._has_told = False  # how much was reused
        self.miss: Miss | None = None
        self.saved_s: float | None = None
        self.expires_at: float | None = None

    @property
    def params(self) -> SamplingParams:
        """The settings of the prompt."""
        return self.outputs[0].request.params

    @property
    def is_finished(self) -> bool:
        """Whether every output has ended."""
        return len(self.outputs) == self.num_expected and all(
            output.finish_reason is not None for output in self.outputs
        )

    def begin_step(self) -> None:
        """Some of it is computed now."""
        if self._queue_s is None:
            self._queue_s = perf_counter() - self._started_s

    def piece(self, output: OutputStream, sampled: Sequence[Sampled], text: str) -> Piece:
        """What a step has added to `output`; the receipt comes with the very last piece."""
        if sampled and self._first_token_s is None:
            self._first_token_s = perf_counter() - self._started_s
        is_first, self._has_told = not self._has_told, True
        return Piece(
            request_id=self.request_id,
            choice=output.choice,
            token_ids=tuple(one.token_id for one in sampled),
            text=text,
            sampled=tuple(sampled) if self.params.logprobs is not None else (),
            finish_reason=output.finish_reason,
            failure=output.row.failure if output.finish_reason is FinishReason.ERROR else None,
            reused_tokens=self._reused_tokens if is_first else None,
            receipt=self._receipt() if self.is_finished else None,
        )

    @property
    def _reused_tokens(self) -> int:
        # Never admitted (aborted while waiting): nothing was reused, nothing computed for it yet.
        return self.outputs[0].request.reused_tokens or 0

    def _receipt(self) -> Receipt:
        first, reused = self.outputs[0].request, self._reused_tokens
        computed = first.num_prompt - reused
        return Receipt(
            prompt_tokens=first.num_prompt,
            reused_tokens=reused,
            computed_tokens=computed,
            output_tokens=sum(len(output.output_ids) for output in self.outputs),
            tokens_by_source=_by_source(reused, computed, first.tokens_by_source),
            recomputed_tokens=sum(output.request.recomputed_tokens for output in self.outputs),
            load_failures=dict(first.load_failures),
            miss=self.miss,
            num_preemptions=sum(output.request.num_preemptions for output in self.outputs),
            queue_s=self._queue_s,
            restore_s=first.restore_s,
            saved_s=self.saved_s,
            pin=first.claim.pin if first.claim is not None and first.claim.has_pinned else None,
            expires_at=self.expires_at,
            first_token_s=self._first_token_s,
            total_s=perf_counter() - self._started_s,
        )


def _by_source(reused: int, computed: int, loaded: dict[str, int]) -> dict[str, int]:
    """Where the prompt tokens came from; the last one is computed even where its block was loaded."""
    sources = {DEVICE: reused}
    for source, num_tokens in loaded.items():
        taken = min(num_tokens, sources[DEVICE])
        sources[DEVICE] -= taken
        sources[source] = taken
    return sources | {"computed": computed}
