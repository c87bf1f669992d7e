"""The cache as the user of an LLM sees it: by token ids and salt."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from kvkeep.cache import CacheStats, DropReceipt, VerifyReport
from kvkeep.engine.engine import Engine
from kvkeep.engine.portable import (
    ExportReceipt,
    ImportReceipt,
    export_chains,
    import_chains,
)
from kvkeep.errors import RequestError
from kvkeep.planning import Coverage

__all__ = ["PromptCache"]


class PromptCache:
    """Questions and orders about what an engine's cache holds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def coverage(self, token_ids: Sequence[int], *, salt: str | None = None) -> Coverage:
        """Which runs of the tokens are known, and where. Changes nothing."""
        return self._engine.cache.coverage(self._engine.chain(token_ids, salt))

    def drop(
        self, token_ids: Sequence[int], blocks: Iterable[int], *, salt: str | None = None
    ) -> DropReceipt:
        """Forget these block numbers of this chain everywhere; the next request computes just them.

        Raises RequestError for a number that is not one of the chain's full blocks.
        """
        chain, numbers = self._engine.chain(token_ids, salt), list(blocks)
        for number in numbers:
            if not 0 <= number < len(chain.keys):
                raise RequestError(
                    f"blocks has {number}, but {len(chain)} tokens have full blocks 0 to "
                    f"{len(chain.keys) - 1} (block_size={chain.block_size}); give numbers of these"
                )
        return self._engine.cache.drop(chain, numbers)

    def clear(self, *, tiers: bool = False) -> DropReceipt:
        """Forget everything on the device; running requests keep what they hold as their own.

        With `tiers` also all that is in the tiers, whoever put it there.
        """
        return self._engine.cache.clear(tiers=tiers)

    def offload(self) -> int:
        """Move what no request uses down to the tiers now; returns the blocks that left the device."""
        return self._engine.cache.offload()

    def export(
        self, path: str | Path, prompts: Sequence[Sequence[int]], *, salt: str | None = None
    ) -> ExportReceipt:
        """Write what is known of these prompts' tokens to one file: see docs/formats.md."""
        chains = [self._engine.chain(prompt, salt) for prompt in prompts]
        if not chains:
            raise RequestError("prompts is empty; give the token ids of at least one")
        return export_chains(self._engine.installed, chains, path)

    def import_(self, path: str | Path, *, salt: str | None = None) -> ImportReceipt:
        """Enter the blocks of an exported file. Raises RequestError where they are not this model's."""
        root = self._engine.namespace(salt).root_key()
        return import_chains(self._engine.installed, root, path)

    def verify(self, *, tiers: bool = False) -> VerifyReport:
        """Check every invariant of the bookkeeping; with `tiers` read all they have. Changes nothing."""
        return self._engine.cache.verify(tiers=tiers)

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free."""
        return self._engine.cache.stats()
