"""The KV cache as one object, and what it answers."""

from kvkeep.cache.base import BlockStore, PayloadStore
from kvkeep.cache.block_bytes import BlockBytes, InsertOutcome
from kvkeep.cache.cache import KVCache
from kvkeep.cache.choosing import Chooser
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.lookups import Lookup
from kvkeep.cache.receipts import (
    CacheStats,
    DropReceipt,
    GroupStats,
    Receipt,
    TierReport,
    VerifyReport,
)

__all__ = [
    "BlockBytes",
    "BlockStore",
    "BlockTable",
    "CacheStats",
    "Chooser",
    "DropReceipt",
    "GroupStats",
    "Hierarchy",
    "InsertOutcome",
    "KVCache",
    "Lease",
    "Lookup",
    "PayloadStore",
    "Receipt",
    "TierReport",
    "VerifyReport",
]
