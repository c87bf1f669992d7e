"""POST /v1/completions: one or several prompts, as text or token ids; answers and streams."""

import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from fastapi import Request
from starlette.responses import Response

from kvkeep.cache import Receipt
from kvkeep.config import SamplingParams
from kvkeep.engine import Piece
from kvkeep.errors import RequestError
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_fields import CacheFields, read_cache_fields
from kvkeep.server.cache_report import usage_fields, written_tokens
from kvkeep.server.disconnect import unless_disconnected
from kvkeep.server.job_events import JobEvents
from kvkeep.server.jobs import Job, JobStream
from kvkeep.server.json_answer import json_answer
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.openai_chunks import ChunkStream, ChunkWriter
from kvkeep.server.openai_completion_output import CompletionFold, CompletionOutput, TextStyle
from kvkeep.server.openai_output import Head, Json
from kvkeep.server.openai_pieces import arrivals_of
from kvkeep.server.openai_schemas import CompletionRequest
from kvkeep.server.preparing import output_room, prepared_job, report_of
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.sampling_fields import refuse_unsupported, sampling_params
from kvkeep.server.service import Service
from kvkeep.server.sse import DONE

__all__ = ["answer_completion"]

_ROUTE = "/v1/completions"
# What the protocol says a request without max_tokens wants.
_DEFAULT_MAX_TOKENS = 16
_MAX_OUTPUTS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class _Completion:
    """A request that is ready to run: a job for each prompt, and how its outputs are shown."""

    body: CompletionRequest
    jobs: tuple[Job, ...]
    styles: tuple[TextStyle, ...]
    head: Head
    profile: ModelProfile
    fields: CacheFields

    def usage(self, receipts: Sequence[Receipt]) -> Json:
        """The counts of all prompts; with `explain` or `pin` what the cache did for each of them."""
        size = self.profile.block_size
        written = [
            written_tokens(receipt, job.options, size)
            for receipt, job in zip(receipts, self.jobs, strict=True)
        ]
        found: Json = {"usage": usage_fields(receipts, sum(written))}
        reports = [
            report
            for receipt, job in zip(receipts, self.jobs, strict=True)
            for report in report_of(receipt, job, self.fields, self.profile).values()
        ]
        if reports:
            found["kv_cache"] = reports[0] if len(reports) == 1 else reports
        return found


async def answer_completion(
    request: Request,
    body: CompletionRequest,
    asker: Tenant,
    service: Service,
    profile: ModelProfile,
) -> Response:
    """Complete prompts, at once or as a stream. Raises what the app turns into error responses."""
    preparing = _prepared(request, body, asker, service, profile)
    completion = await unless_disconnected(request.receive, preparing)
    keep_alive_s = service.settings.keep_alive_s
    async with AsyncExitStack() as resources:
        # All are queued before the first is waited for: the engine computes them together.
        num_jobs = len(completion.jobs)
        with service.seats.taken(asker, completion.jobs[0].params.n, num_jobs) as seats:
            streams = [
                await resources.enter_async_context(service.generate(job, seats))
                for job in completion.jobs
            ]
        if body.stream:
            return JobEvents(
                streams,
                _CompletionStream(completion, request.scope["path"]),
                keep_alive_s=keep_alive_s,
                resources=resources.pop_all(),
                headers=completion.fields.warnings.headers(),
            )
        return await unless_disconnected(request.receive, _whole(completion, streams, keep_alive_s))


async def _prepared(
    request: Request,
    body: CompletionRequest,
    asker: Tenant,
    service: Service,
    profile: ModelProfile,
) -> _Completion:
    model = service.check_model(body.model)
    refuse_unsupported(body.model_extra)
    if body.echo and body.logprobs is not None:
        raise RequestError("echo=true with logprobs is not supported; leave one of them out")
    if body.logprobs is not None and profile.token_texts is None:
        raise RequestError("logprobs needs a tokenizer, which this model has not; leave it out")
    prompts = await _prompt_ids(body, service, asker)
    fields = read_cache_fields(body, request.headers)
    params = sampling_params(
        body,
        profile.defaults,
        max_tokens=_DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        vocab_size=profile.vocab_size,
        logprobs=body.logprobs,
    )
    _refuse_misfits(params, len(prompts), profile)
    jobs = [
        prepared_job(
            request,
            asker,
            EncodedPrompt(ids=tuple(ids)),
            replace(
                params,
                max_tokens=output_room(params.max_tokens, profile, len(ids), fields.warnings),
            ),
            fields,
            route=_ROUTE,
        )
        for ids in prompts
    ]
    return _Completion(
        body=body,
        jobs=tuple(jobs),
        styles=tuple([await _style(body, ids, service, asker, profile) for ids in prompts]),
        head=_head(model, profile),
        profile=profile,
        fields=fields,
    )


def _head(model: str, profile: ModelProfile) -> Head:
    return Head.fresh(
        "cmpl",
        "text_completion",
        created_s=int(time.time()),
        model=model,
        fingerprint=profile.fingerprint,
    )


def _refuse_misfits(params: SamplingParams, num_prompts: int, profile: ModelProfile) -> None:
    if params.n * num_prompts > _MAX_OUTPUTS:
        raise RequestError(
            f"n={params.n} for {num_prompts} prompts makes {params.n * num_prompts} outputs; ask for at most "
            f"{_MAX_OUTPUTS}"
        )
    if params.stop_strings and profile.token_texts is None:
        raise RequestError(
            f"stop={params.stop!r:.80} needs a tokenizer, which this model has not; use stop_token_ids"
        )


async def _prompt_ids(
    body: CompletionRequest, service: Service, asker: Tenant
) -> list[Sequence[int]]:
    """The prompts as token ids, in order."""
    prompt = body.prompt
    encode = partial(
        service.encode_text, asker, add_special_tokens=body.add_special_tokens is not False
    )
    if isinstance(prompt, str):
        return [(await encode(prompt)).ids]
    ids = [one for one in prompt if isinstance(one, int)]
    if ids:
        return [ids]
    return [
        (await encode(one)).ids if isinstance(one, str) else one
        for one in prompt
        if not isinstance(one, int)
    ]


async def _style(
    body: CompletionRequest,
    ids: Sequence[int],
    service: Service,
    asker: Tenant,
    profile: ModelProfile,
) -> TextStyle:
    echoed = await service.decode(asker, ids, skip_special_tokens=True) if body.echo else ""
    return TextStyle(
        echoed=echoed,
        texts=None if body.logprobs is None else profile.token_texts,
        has_token_ids=bool(body.return_token_ids),
    )


async def _whole(
    completion: _Completion, streams: Sequence[JobStream], keep_alive_s: float
) -> Response:
    outputs = _Outputs(completion)
    folds: dict[int, CompletionFold] = {}
    async for arrivals in arrivals_of(streams, keep_alive_s):
        for arrival in arrivals:
            choice = outputs.take(arrival.piece, arrival.number)
            folds.setdefault(choice["index"], CompletionFold(choice["index"])).add(choice)
    receipts = outputs.receipts()
    body = completion.head.fields()
    body["choices"] = [folds[index].choice() for index in sorted(folds)]
    warnings, size = completion.fields.warnings.headers(), completion.profile.block_size
    return json_answer(body | completion.usage(receipts), receipts, size, warnings)


class _CompletionStream(ChunkStream):
    """The outputs of all prompts as chunks."""

    def __init__(self, completion: _Completion, path: str) -> None:
        super().__init__(path)
        self._completion = completion
        self._outputs = _Outputs(completion)
        num_prompt = sum(len(job.prompt_ids) for job in completion.jobs)
        options = completion.body.stream_options
        self._chunks = ChunkWriter(completion.head, num_prompt, options)

    def take(self, piece: Piece, number: int) -> bytes:
        return self._chunks.of_piece(piece, [self._outputs.take(piece, number)])

    def finish(self) -> bytes:
        return self._chunks.last(self._completion.usage(self._outputs.receipts())) + DONE


class _Outputs:
    """The outputs of all prompts; output c of prompt p has the index p * n + c."""

    def __init__(self, completion: _Completion) -> None:
        self._completion = completion
        self._outputs: dict[int, CompletionOutput] = {}
        self._receipts: dict[int, Receipt] = {}

    def take(self, piece: Piece, number: int) -> Json:
        """The choice that a piece of the prompt with this number adds."""
        if piece.receipt is not None:
            self._receipts[number] = piece.receipt
        job = self._completion.jobs[number]
        index = number * job.params.n + piece.choice
        if index not in self._outputs:
            style = self._completion.styles[number]
            self._outputs[index] = CompletionOutput(index, style, job.prompt_ids)
        return self._outputs[index].take(piece)

    def receipts(self) -> list[Receipt]:
        """One for each prompt, once all have ended."""
        return [self._receipts[number] for number in range(len(self._completion.jobs))]
