"""The cache as the user of an LLM sees it: by token ids and salt."""

from collections.abc import Iterable, Sequence

from kvkeep.cache import CacheStats, DropReceipt, VerifyReport
from kvkeep.engine.engine import Engine
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

    def clear(self) -> DropReceipt:
        """Forget everything; running requests keep what they hold as their own."""
        return self._engine.cache.clear()

    def verify(self) -> VerifyReport:
        """Check every invariant of the bookkeeping. Changes nothing."""
        return self._engine.cache.verify()

    def stats(self) -> CacheStats:
        """Bytes and blocks in use, reusable and free."""
        return self._engine.cache.stats()
