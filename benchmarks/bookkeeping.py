"""A cache without bytes, to measure the bookkeeping alone. Loads no torch."""

from collections.abc import Sequence

from kvkeep.blocks import Namespace, TokenChain
from kvkeep.cache import KVCache
from kvkeep.spec import BlockId, GroupSpec, KVSpec, LayerKind

__all__ = ["NullStore", "make_cache", "make_chain"]


class NullStore:
    """A BlockStore that has no bytes to copy."""

    def copy_block(self, group: int, source: BlockId, target: BlockId) -> None:
        """Do nothing."""

    def reset_state(self, group: int, block: BlockId) -> None:
        """Do nothing."""

    def poison(self, group: int, blocks: Sequence[BlockId]) -> None:
        """Do nothing."""


def make_cache(block_size: int, num_tokens: int) -> KVCache:
    """A cache of one full-attention group, as of Qwen3-0.6B, with room for `num_tokens`."""
    group = GroupSpec(
        name="full-8x128",
        kind=LayerKind.FULL,
        layers=tuple(range(28)),
        k_heads=8,
        k_dim=128,
        v_heads=8,
        v_dim=128,
        itemsize=2,
    )
    spec = KVSpec(groups=(group,), block_size=block_size, dtype="bfloat16")
    return KVCache(spec, [spec.num_blocks(num_tokens)], NullStore())


def make_chain(block_size: int, token_ids: Sequence[int]) -> TokenChain:
    """The chain of a prompt in a namespace of its own for each block size."""
    namespace = Namespace(model="null", positions="", kv_format="bfloat16", block_size=block_size)
    return TokenChain(namespace.root_key(), block_size, token_ids)
