"""The KV cache as one object, and what it answers."""

from kvkeep.cache.cache import BlockStore, KVCache
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.receipts import CacheStats, DropReceipt, GroupStats, Receipt, VerifyReport

__all__ = [
    "BlockStore",
    "BlockTable",
    "CacheStats",
    "DropReceipt",
    "GroupStats",
    "KVCache",
    "Lease",
    "Receipt",
    "VerifyReport",
]
