"""What the protocols need to know of the model that is served, found out once."""

import asyncio
from hashlib import sha256
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from kvkeep.engine import Engine
from kvkeep.llm import LLM
from kvkeep.server.call_syntax import syntax_of
from kvkeep.server.sampling_fields import SamplingDefaults
from kvkeep.server.service import Service
from kvkeep.server.structured import Grammars
from kvkeep.server.token_texts import TokenTexts, Vocabulary

__all__ = ["ModelProfile", "Profile", "profile_of"]


class ModelProfile:
    """What is constant as long as a model is served; made beside the engine, of which only shapes are read.

    `longest_text` is the most tokens of a prompt and its output: the context ends, or the cache's memory.
    `fingerprint` changes with the weights, as clients of the OpenAI protocol expect. `call_syntax` is how it
    writes calls of tools. `token_texts` and `grammars` are None for a model without tokenizer.
    """

    def __init__(self, llm: LLM) -> None:
        installed = llm.engine.installed
        self.vocab_size = installed.vocab_size
        self.block_size = llm.settings.block_size
        self.max_context = installed.max_context
        self.longest_text = _longest_text(llm.engine)
        self.defaults = SamplingDefaults.of(llm.model.generation_config)
        digest = sha256(repr(installed.namespace).encode()).hexdigest()
        self.fingerprint = f"fp_{digest[:12]}"
        self.call_syntax = syntax_of(getattr(llm.tokenizer, "chat_template", None))
        self.token_texts = None
        self.grammars = None
        if llm.tokenizer is not None:
            self.token_texts = TokenTexts(cast("Vocabulary", llm.tokenizer))
            self.grammars = Grammars(
                llm.tokenizer,
                vocab_size=self.vocab_size,
                eos_ids=_end_ids(llm),
                syntax=self.call_syntax,
            )


def _longest_text(engine: Engine) -> int:
    have = engine.cache.num_blocks()

    def fits(num_tokens: int) -> bool:
        needed = engine.cache.blocks_needed(num_tokens, engine.settings.max_batch_tokens)
        return all(need <= room for need, room in zip(needed, have, strict=True))

    least, most = 0, engine.installed.max_context
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def _end_ids(llm: LLM) -> frozenset[int]:
    """The tokens that end an output, as the engine was given them."""
    configs: tuple[Any, ...] = (llm.model.generation_config, llm.model.config, llm.tokenizer)
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


async def profile_of(request: Request) -> ModelProfile:
    """The profile of the model behind a route. Raises ApiError 503 while the model is loading."""
    state = request.app.state
    service: Service = state.service
    llm = service.llm
    found = getattr(state, "model_profile", None)
    if found is None:
        found = await asyncio.to_thread(ModelProfile, llm)
        state.model_profile = found
    assert isinstance(found, ModelProfile)
    return found


# A parameter of routes: the profile.
Profile = Annotated[ModelProfile, Depends(profile_of)]
