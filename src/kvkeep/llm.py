"""The three-line offline API: load, generate, look at what the cache did."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import torch

from kvkeep.cache import Receipt
from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.config.tier_tables import parse_tier
from kvkeep.engine import Choice, Engine, Output, Piece
from kvkeep.engine.detokenizer import TokenDecoder
from kvkeep.engine.given import (
    Message,
    Prompt,
    check_messages,
    check_prompt,
    given_prompts,
    is_conversation,
)
from kvkeep.engine.prompt_cache import PromptCache
from kvkeep.errors import ConfigError, KVKeepError, RequestError
from kvkeep.hf.install import InstalledModel, install
from kvkeep.hf.load import load_model
from kvkeep.spec import RequestId
from kvkeep.tiers import TierSettings
from kvkeep.tiers.floors import tier_settings

__all__ = ["LLM", "Message", "Prompt", "Stream"]


class LLM:
    """A model with its cache.

        llm = LLM("tiny")
        out = llm.generate("def add(a, b):", SamplingParams(max_tokens=16, temperature=0))
        out[0].text, out[0].receipt

    `model` is "tiny" (the bundled one), a path, a hub id, a transformers model, or (model, tokenizer). The
    settings are those of EngineSettings; `capacity` is the device memory of the cache. Not thread-safe.

    `tiers` is what lies below the device, one or several, nearest first: Host, Disk and Remote of
    kvkeep.tiers, or text such as "host:4GB". Closing the LLM, or the end of the process, writes what is to
    survive to those that do.
    """

    def __init__(
        self,
        model: object,
        tokenizer: object = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        settings: EngineSettings | None = None,
        tiers: Sequence[TierSettings | str] | TierSettings | str = (),
        **options: Any,  # the fields of EngineSettings, which checks them
    ) -> None:
        floors = _tiers(tiers)
        loaded = load_model(model, tokenizer, dtype=dtype, device=device)
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.settings = _settings(settings, options)
        self.engine = Engine(
            install(loaded.model, self.settings, tiers=floors),
            self.settings,
            tokenizer=cast("TokenDecoder | None", loaded.tokenizer),
            eos_ids=loaded.eos_ids,
        )
        self.cache = PromptCache(self.engine, _warmer(weakref.ref(self)))
        self._inboxes: dict[RequestId, list[Piece]] = {}
        # Also when the process ends; the engine knows nothing of its LLM, or this would keep both.
        self._finish = weakref.finalize(self, self.engine.close)

    def close(self) -> None:
        """End all requests and close the tiers, which first get what is to survive. Again does nothing."""
        self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def installed(self) -> InstalledModel:
        """The mode that was chosen, the self-test's numbers, and the shapes of the cache."""
        return self.engine.installed

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache: CacheOptions | None = None,
    ) -> list[Output]:
        """Complete one or many prompts, text or token ids; one Output each, in order.

        `params` is for all prompts or has one entry for each. If one prompt is refused, none is run.
        """
        prompt_ids = [self.encode(prompt) for prompt in given_prompts(prompts)]
        each = _one_each(params, len(prompt_ids))
        request_ids: list[RequestId] = []
        try:
            for ids, one in zip(prompt_ids, each, strict=True):
                request_ids.append(self._add(ids, one, cache))
            while any(request_id not in self._done for request_id in request_ids):
                self._step()
            return [
                _output(ids, self._inboxes[request_id])
                for ids, request_id in zip(prompt_ids, request_ids, strict=True)
            ]
        finally:
            self._forget(request_ids)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        cache: CacheOptions | None = None,
    ) -> Output:
        """Answer a conversation: messages of `role` and `content`, in the model's chat template."""
        return self.generate([self.encode_chat(messages)], params, cache=cache)[0]

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        cache: CacheOptions | None = None,
    ) -> "Stream":
        """Complete one prompt or conversation piece by piece; see Stream for how it ends."""
        encode: Any = self.encode_chat if is_conversation(prompt) else self.encode
        ids = encode(prompt)
        return Stream(self, self._add(ids, params or SamplingParams(), cache))

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids pass through. Raises RequestError for text without a tokenizer."""
        check_prompt("prompt", prompt)
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError("prompt is text but the model has no tokenizer; give token ids")
        return list(self.tokenizer.encode(prompt))

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises RequestError for what is none, and for one that the model's template refuses.
        """
        check_messages(messages)
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise RequestError("the model has no chat template; use generate with a plain prompt")
        try:
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
        except Exception as error:  # a template is a program of somebody else's
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise RequestError(
                f"messages cannot be written in the model's chat template ({reason}); change the roles or "
                "contents that it names"
            ) from error
        return list(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special tokens."""
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer; load one to decode tokens")
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def _done(self) -> set[RequestId]:
        return {
            request_id
            for request_id, pieces in self._inboxes.items()
            if pieces and pieces[-1].receipt is not None
        }

    def _add(
        self, prompt_ids: Sequence[int], params: SamplingParams, cache: CacheOptions | None
    ) -> RequestId:
        options = CacheOptions() if cache is None else cache
        _check_is("params", params, SamplingParams)
        _check_is("cache", options, CacheOptions)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                f"stop={params.stop!r} needs a tokenizer, which the model has not; use stop_token_ids"
            )
        request_id = self.engine.add(prompt_ids, params, options)
        self._inboxes[request_id] = []
        return request_id

    def _step(self) -> None:
        num_before = self.engine.num_steps
        for piece in self.engine.step():
            if piece.request_id in self._inboxes:
                self._inboxes[piece.request_id].append(piece)
        is_stuck = self.engine.num_steps == num_before and not self.engine.is_waiting
        if self.engine.has_work and is_stuck:
            raise KVKeepError("no request can run although some wait; please report this as a bug")

    def _forget(self, request_ids: Sequence[RequestId]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)
            self._inboxes.pop(request_id, None)


class Stream(Iterator[Piece]):
    """The pieces of one request, computed as they are asked for.

    Closing it, leaving its `with` block, or letting go of it, read or not, aborts the request.
    """

    def __init__(self, llm: LLM, request_id: RequestId) -> None:
        self._llm = llm
        self._request_id = request_id
        self._inbox = llm._inboxes[request_id]
        self._is_open = True

    def __next__(self) -> Piece:
        if not self._is_open:
            raise StopIteration
        try:
            while not self._inbox:
                self._llm._step()
        except BaseException:
            self.close()
            raise
        piece = self._inbox.pop(0)
        if piece.receipt is not None:
            self.close()
        return piece

    def close(self) -> None:
        """Abort the request if it is not finished. Calling it again does nothing."""
        if self._is_open:
            self._is_open = False
            self._llm._forget([self._request_id])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _warmer(of: "weakref.ref[LLM]") -> Callable[[Sequence[int], CacheOptions], Receipt]:
    """Computes prompts without output; knows the LLM only as long as somebody else does."""

    def compute(token_ids: Sequence[int], options: CacheOptions) -> Receipt:
        llm = of()
        assert llm is not None, "the cache is asked through its LLM"
        params = SamplingParams(max_tokens=0)
        return llm.generate([list(token_ids)], params, cache=options)[0].receipt

    return compute


def _settings(settings: EngineSettings | None, options: dict[str, Any]) -> EngineSettings:
    if settings is not None and options:
        raise RequestError(f"settings and {', '.join(options)} were both given; give one of them")
    return settings or EngineSettings.of(options)


def _tiers(tiers: Sequence[TierSettings | str] | TierSettings | str) -> list[TierSettings]:
    if isinstance(tiers, str) or not isinstance(tiers, Iterable):
        return [_tier(tiers)]
    return [_tier(tier) for tier in tiers]


def _tier(tier: TierSettings | str) -> TierSettings:
    if isinstance(tier, str):
        return tier_settings(parse_tier(tier))
    if isinstance(tier, type) or not callable(getattr(tier, "open", None)):
        raise ConfigError(
            f"tiers={tier!r:.80} is no tier; give Host, Disk or Remote of kvkeep.tiers, or text such as "
            '"host:4GB"'
        )
    return tier


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, Mapping) or not isinstance(params, Sequence):
        _check_is("params", params, SamplingParams)
        return [cast("SamplingParams", params)] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"params has {len(params)} entries for {num_prompts} prompts; give one, or one for each"
        )
    return list(params)


def _check_is(field: str, value: object, kind: type) -> None:
    """Raise ConfigError for what is not of `kind`, with how it is written."""
    if isinstance(value, kind):
        return
    given = (
        ", ".join(f"{name}={one!r}" for name, one in value.items())
        if isinstance(value, Mapping)
        else "..."
    )
    raise ConfigError(
        f"{field}={value!r:.200} is no {kind.__name__}; give {kind.__name__}({given:.200})"
    )


def _output(prompt_ids: Sequence[int], pieces: Sequence[Piece]) -> Output:
    receipt = pieces[-1].receipt
    assert receipt is not None
    num_choices = max(piece.choice for piece in pieces) + 1
    choices = []
    for choice in range(num_choices):
        own = [piece for piece in pieces if piece.choice == choice]
        reason = own[-1].finish_reason
        assert reason is not None
        choices.append(
            Choice(
                token_ids=tuple(token for piece in own for token in piece.token_ids),
                text="".join(piece.text for piece in own),
                finish_reason=reason,
                sampled=tuple(one for piece in own for one in piece.sampled),
            )
        )
    return Output(prompt_ids=tuple(prompt_ids), choices=tuple(choices), receipt=receipt)
