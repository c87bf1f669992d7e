"""What a cache might say of itself, for tests that show it."""

from kvkeep.cache import CacheStats

STATS = CacheStats(
    capacity_bytes=1000,
    in_use_bytes=250,
    reusable_bytes=350,
    free_bytes=400,
    open_leases=1,
    reused_tokens=0,
    computed_tokens=0,
    groups=(),
)
