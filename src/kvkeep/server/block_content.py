"""Which tokens a block holds, and their text: found in the prompts that were sent lately."""

from collections.abc import Sequence
from typing import Any

from kvkeep.blocks import TokenChain
from kvkeep.cache import BlockReport
from kvkeep.cache.explain import unpack_tokens
from kvkeep.server.auth import Tenant
from kvkeep.server.service import Service
from kvkeep.spec import BlockKey

__all__ = ["block_content"]


async def block_content(
    service: Service, asker: Tenant, report: BlockReport
) -> dict[str, Any] | None:
    """Position, tokens and text of a block; None where no prompt that has it is remembered."""
    size = service.llm.settings.block_size
    prompts = await service.call(lambda llm: llm.engine.history.sent(report.namespace))

    # Keys of many prompts are computed: neither the engine nor the loop waits for that.
    def find() -> dict[str, Any] | None:
        return _found(prompts, report.namespace, report.key, size)

    content = await service.in_thread(asker, find)
    if content is not None:
        content["text"] = await service.decode(asker, content["token_ids"])
    return content


def _found(
    prompts: Sequence[bytes], root: BlockKey, key: BlockKey, size: int
) -> dict[str, Any] | None:
    for packed in prompts:
        chain = TokenChain(root, size, unpack_tokens(packed))
        if key in chain.keys:
            start = chain.keys.index(key) * size
            return {"start": start, "token_ids": chain.tokens(start, start + size)}
    return None
