"""Who holds which block: keys, pool, index. No tensors."""

from kvkeep.blocks.index import BlockIndex, Entry, PartialMatch
from kvkeep.blocks.keys import Namespace, TokenChain, pack_tokens, stored_key
from kvkeep.blocks.ledger import BlockLedger, OnEvict
from kvkeep.blocks.pool import Allocation, BlockPool, BlockState
from kvkeep.blocks.split_pool import SplitPool

__all__ = [
    "Allocation",
    "BlockIndex",
    "BlockLedger",
    "BlockPool",
    "BlockState",
    "Entry",
    "Namespace",
    "OnEvict",
    "PartialMatch",
    "SplitPool",
    "TokenChain",
    "pack_tokens",
    "stored_key",
]
