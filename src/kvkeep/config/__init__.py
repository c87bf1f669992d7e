"""Settings: frozen, keyword-only, validated once."""

from kvkeep.config.cache_options import CacheOptions, TagSpan
from kvkeep.config.durations import parse_duration
from kvkeep.config.engine import EngineSettings
from kvkeep.config.sampling import SamplingParams
from kvkeep.config.sizes import parse_bytes

__all__ = [
    "CacheOptions",
    "EngineSettings",
    "SamplingParams",
    "TagSpan",
    "parse_bytes",
    "parse_duration",
]
