"""How long cached blocks live, and for whom: labels, claims of requests, sessions, tags, pins. No tensors."""

from kvkeep.cache.lifetimes.claims import Claim
from kvkeep.cache.lifetimes.labels import (
    ContextId,
    Labels,
    PinId,
    SessionId,
    decode_labels,
    encode_labels,
    merge_labels,
)
from kvkeep.cache.lifetimes.lifetimes import Arrival, Lifetimes, Listener
from kvkeep.cache.lifetimes.receipts import (
    BlockReport,
    PinReport,
    PurgeReceipt,
    QuotaReport,
    SessionReport,
)
from kvkeep.cache.lifetimes.register import Change, Register
from kvkeep.cache.lifetimes.selector import Match, Query, Selector, match
from kvkeep.cache.lifetimes.sessions import Session, Sessions
from kvkeep.cache.lifetimes.settings import LifetimeSettings
from kvkeep.cache.lifetimes.tombstones import Tombstone

__all__ = [
    "Arrival",
    "BlockReport",
    "Change",
    "Claim",
    "ContextId",
    "Labels",
    "LifetimeSettings",
    "Lifetimes",
    "Listener",
    "Match",
    "PinId",
    "PinReport",
    "PurgeReceipt",
    "Query",
    "QuotaReport",
    "Register",
    "Selector",
    "Session",
    "SessionId",
    "SessionReport",
    "Sessions",
    "Tombstone",
    "decode_labels",
    "encode_labels",
    "match",
    "merge_labels",
]
