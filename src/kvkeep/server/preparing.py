"""From a request's fields to a job, and from a receipt to what is said of the cache, on all protocols."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from fastapi import Request

from kvkeep.cache import Receipt
from kvkeep.cache.explain import Outline
from kvkeep.config import SamplingParams
from kvkeep.config.grammar import Grammar
from kvkeep.errors import RequestError
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_fields import CacheFields, Warnings
from kvkeep.server.cache_report import cache_report
from kvkeep.server.cache_scope import check_pins, pin_prefix, scope_of
from kvkeep.server.model_profile import ModelProfile
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.service import Job, Service, request_id_of
from kvkeep.server.structured import AnswerForm

__all__ = ["compiled", "output_room", "prepared_job", "report_of", "template_tools"]

_PIN_DIGITS = 16


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
    """The job of a prompt, with tags where its parts begin, and salt and pin of the tenant.

    Raises ApiError 403 for a pin where pins are the administrator's.
    """
    options = fields.options_for(
        salt=asker.salt_for(fields.options.salt),
        message_starts=prompt.message_starts,
        part_starts=prompt.part_starts,
    )
    if options.pin:
        scope = scope_of(asker, request.app.state.service.settings)
        check_pins(scope, "kv_cache.pin")
        options = replace(options, pin=scope.pin_name(_pin_name(prompt.ids, options.salt)))
    return Job(
        prompt_ids=prompt.ids,
        params=params,
        options=options,
        tenant=asker,
        request_id=request_id_of(request),
        route=route,
        explain=fields.explain,
        outline=outline,
    )


async def compiled(
    form: AnswerForm | None, profile: ModelProfile, service: Service, asker: Tenant
) -> Grammar | None:
    """The grammar of an answer that has to be of this form; None for any text."""
    grammars = profile.grammars
    if form is None:
        return None
    if grammars is None:
        raise RequestError(f"{form.field} needs a tokenizer, which this model has not")
    kept = await service.in_thread(asker, lambda: grammars.kept(form))
    return kept or await service.in_compiler(asker, lambda: grammars.compile(form))


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


def output_room(
    asked: int | None, profile: ModelProfile, num_prompt: int, warnings: Warnings
) -> int:
    """The most tokens to answer with: as asked, as far as context and memory go; less becomes a warning.

    A prompt that leaves no room is refused by the engine, which says why.
    """
    if asked == 0:
        return 0
    room = max(1, profile.longest_text - num_prompt)
    if asked is None or asked <= room:
        return room if asked is None else asked
    warnings.add(
        f"the answer has at most {room} tokens, not {asked}: no more fit behind the prompt"
    )
    return room


def report_of(
    receipt: Receipt, job: Job, fields: CacheFields, profile: ModelProfile
) -> dict[str, Any]:
    """The object `kv_cache` of an answer to a request with `explain`, or of its pin alone; else nothing."""
    pin = None if receipt.pin is None else receipt.pin.removeprefix(pin_prefix(job.tenant))
    if not fields.explain:
        return {"kv_cache": {"pin": pin}} if fields.options.pin else {}
    report = cache_report(receipt, job.options, profile.block_size, texts=profile.token_texts)
    return {"kv_cache": {**report, "pin": pin}}


def _pin_name(prompt_ids: Sequence[int], salt: str | None) -> str:
    """The name of a request's pin: the same for the same prompt."""
    digest = sha256((salt or "").encode(errors="surrogatepass"))
    digest.update(b"\0" + array("I", prompt_ids).tobytes())
    return f"prompt:{digest.hexdigest()[:_PIN_DIGITS]}"
