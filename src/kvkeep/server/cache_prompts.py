"""Prompts that routes of the cache are given, as tokens and with the outline that explains misses."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from kvkeep.cache.explain import Outline
from kvkeep.server.auth import Tenant
from kvkeep.server.cache_fields import without_cache_fields
from kvkeep.server.cache_schemas import PromptFields
from kvkeep.server.errors import ApiError
from kvkeep.server.prompts import EncodedPrompt
from kvkeep.server.service import Service

__all__ = ["GivenPrompt", "encode_given", "outline_of"]

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """A prompt that was not sent to be answered."""

    ids: Sequence[int]
    outline: Outline


async def encode_given(service: Service, asker: Tenant, given: PromptFields) -> GivenPrompt:
    """Tokens of the one form that is given. Raises ApiError 400 for what is empty or too long."""
    service.check_model(given.model)
    if given.messages is not None:
        messages = without_cache_fields(given.messages)
        encoded = await service.encode_chat(
            asker,
            messages,
            given.tools,
            given.chat_template_kwargs,
            add_generation_prompt=given.add_generation_prompt,
        )
        outline = outline_of(encoded, messages, given.tools, given.chat_template_kwargs)
        prompt = GivenPrompt(encoded.ids, outline)
    elif given.prompt is not None:
        prompt = GivenPrompt((await service.encode_text(asker, given.prompt)).ids, Outline())
    else:
        prompt = GivenPrompt(given.token_ids or (), Outline())
    most = service.max_prompt_tokens
    if not 0 < len(prompt.ids) <= most:
        raise ApiError(
            400, f"the prompt has {len(prompt.ids)} tokens; give 1 to {most}", code="prompt_length"
        )
    largest, vocabulary = max(prompt.ids), service.llm.installed.vocab_size
    if largest >= vocabulary:
        raise ApiError(
            400,
            f"token_ids has {largest}, but the model knows ids below {vocabulary}",
            param="token_ids",
        )
    return prompt


def outline_of(
    encoded: EncodedPrompt,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_options: Mapping[str, Any] | None,
) -> Outline:
    """What an encoded conversation is made of."""
    return Outline(
        message_starts=tuple(encoded.message_starts),
        roles=tuple(str(message.get("role", "")) for message in messages),
        tools=_digest(tools),
        template=_digest(template_options),
    )


def _digest(value: object) -> bytes:
    """A digest of JSON whose order of keys counts, since templates write it as it comes; b"" for nothing."""
    if not value:
        return b""
    return sha256(json.dumps(value, default=str).encode()).digest()[:_DIGEST_BYTES]
