"""From a request's fields to a job, and from a receipt to what is said of the cache, on all protocols."""

import time
from typing import Any

from fastapi import Request

from kvkeep.cache import Receipt
from kvkeep.cache.explain import Outline
from kvkeep.config import SamplingParams
from kvkeep.config.grammar import Grammar
from kvkeep.errors import RequestError
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_fields import CacheFields
from kvkeep.server.cache_report import cache_report
from kvkeep.server.model_profile import ModelProfile, longest_output
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.service import Job, Service, request_id_of
from kvkeep.server.structured import AnswerForm

__all__ = ["compiled", "output_room", "prepared_job", "report_of", "template_tools"]


def prepared_job(
    request: Request,
    asker: Tenant,
    prompt: EncodedPrompt,
    params: SamplingParams,
    fields: CacheFields,
    *,
    route: str,
    outline: Outline | None = None,
) -> Job:
    """The job of a prompt, with tags where its parts begin and the salt of the tenant."""
    return Job(
        prompt_ids=prompt.ids,
        params=params,
        options=fields.options_for(
            salt=asker.salt_for(fields.options.salt),
            message_starts=prompt.message_starts,
            part_starts=prompt.part_starts,
        ),
        tenant=asker,
        request_id=request_id_of(request),
        route=route,
        explain=fields.explain,
        outline=outline,
    )


async def compiled(
    form: AnswerForm | None, profile: ModelProfile, service: Service
) -> Grammar | None:
    """The grammar of an answer that has to be of this form; None for any text."""
    grammars = profile.grammars
    if form is None:
        return None
    if grammars is None:
        raise RequestError(f"{form.field} needs a tokenizer, which this model has not")
    return await service.in_thread(lambda: grammars.compile(form))


def template_tools(
    tools: list[dict[str, Any]] | None, service: Service, *, may_call: bool
) -> list[dict[str, Any]] | None:
    """The tools for the template, also when none may be called, so that the prompt stays the same.

    Raises RequestError where the template says nothing of tools and one may be called.
    """
    if not tools or service.prompts.takes_tools:
        return tools
    if not may_call:
        return None
    raise RequestError(
        "tools cannot be given to this model: its chat template says nothing of them; leave them out"
    )


def output_room(asked: int | None, service: Service, num_prompt: int) -> int:
    """The most tokens to answer with: as asked, as far as context and memory go.

    A prompt that leaves no room is refused by the engine, which says why.
    """
    if asked == 0:
        return 0
    room = max(1, longest_output(service.llm.engine, num_prompt))
    return room if asked is None else min(asked, room)


def report_of(
    receipt: Receipt, job: Job, fields: CacheFields, profile: ModelProfile
) -> dict[str, Any]:
    """The object `kv_cache` of an answer to a request with `explain`, else nothing."""
    if not fields.explain:
        return {}
    report = cache_report(
        receipt, job.options, profile.block_size, now_s=time.time(), texts=profile.token_texts
    )
    return {"kv_cache": report}
