"""The KV cache as one object, and what it answers."""

from kvkeep.cache.base import BlockStore, PayloadStore
from kvkeep.cache.block_bytes import BlockBytes, InsertOutcome
from kvkeep.cache.cache import KVCache
from kvkeep.cache.choosing import Chooser
from kvkeep.cache.hierarchy import Hierarchy
from kvkeep.cache.lease import BlockTable, Lease
from kvkeep.cache.lifetimes import (
    BlockReport,
    Claim,
    Lifetimes,
    LifetimeSettings,
    PinId,
    PinReport,
    PurgeReceipt,
    Query,
    QuotaReport,
    Selector,
    SessionId,
    SessionReport,
)
from kvkeep.cache.lookups import Lookup
from kvkeep.cache.purges import Purge
from kvkeep.cache.receipts import (
    CacheStats,
    CopyReport,
    DropReceipt,
    GroupStats,
    Receipt,
    TierReport,
    VerifyReport,
)

__all__ = [
    "BlockBytes",
    "BlockReport",
    "BlockStore",
    "BlockTable",
    "CacheStats",
    "Chooser",
    "Claim",
    "CopyReport",
    "DropReceipt",
    "GroupStats",
    "Hierarchy",
    "InsertOutcome",
    "KVCache",
    "Lease",
    "LifetimeSettings",
    "Lifetimes",
    "Lookup",
    "PayloadStore",
    "PinId",
    "PinReport",
    "Purge",
    "PurgeReceipt",
    "Query",
    "QuotaReport",
    "Receipt",
    "Selector",
    "SessionId",
    "SessionReport",
    "TierReport",
    "VerifyReport",
]
