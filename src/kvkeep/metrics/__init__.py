"""Counters of a server, in the words of Prometheus. No tensors, and nothing of the cache itself."""

from kvkeep.metrics.base import CacheCounts, ReceiptCounts, Snapshot
from kvkeep.metrics.metrics import COMPAT_NAMES, MEDIA_TYPE, Metrics
from kvkeep.metrics.requests import REUSE_CLASSES, Times, reuse_class

__all__ = [
    "COMPAT_NAMES",
    "MEDIA_TYPE",
    "REUSE_CLASSES",
    "CacheCounts",
    "Metrics",
    "ReceiptCounts",
    "Snapshot",
    "Times",
    "reuse_class",
]
