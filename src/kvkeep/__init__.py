"""kvkeep: the KV cache of LLM inference as one library.

The names below are loaded on first use, so ``import kvkeep`` costs nothing and the parts without
tensors stay free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvkeep.cache import PurgeReceipt, Receipt, Selector
    from kvkeep.config import CacheOptions, SamplingParams, TagSpan
    from kvkeep.errors import (
        CapacityError,
        CodecError,
        ConfigError,
        CorruptBlockError,
        KVKeepError,
        RequestError,
        SamplingError,
        TierError,
        UnsupportedModelError,
    )
    from kvkeep.hf.generate_cache import KeepCache
    from kvkeep.llm import LLM
    from kvkeep.planning import Coverage

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CacheOptions",
    "CapacityError",
    "CodecError",
    "ConfigError",
    "CorruptBlockError",
    "Coverage",
    "KVKeepError",
    "KeepCache",
    "PurgeReceipt",
    "Receipt",
    "RequestError",
    "SamplingError",
    "SamplingParams",
    "Selector",
    "TagSpan",
    "TierError",
    "UnsupportedModelError",
    "__version__",
]

_NAME_TO_MODULE = {
    "LLM": "kvkeep.llm",
    "CacheOptions": "kvkeep.config",
    "CapacityError": "kvkeep.errors",
    "CodecError": "kvkeep.errors",
    "ConfigError": "kvkeep.errors",
    "CorruptBlockError": "kvkeep.errors",
    "Coverage": "kvkeep.planning",
    "KVKeepError": "kvkeep.errors",
    "KeepCache": "kvkeep.hf.generate_cache",
    "PurgeReceipt": "kvkeep.cache",
    "Receipt": "kvkeep.cache",
    "RequestError": "kvkeep.errors",
    "SamplingError": "kvkeep.errors",
    "SamplingParams": "kvkeep.config",
    "Selector": "kvkeep.cache",
    "TagSpan": "kvkeep.config",
    "TierError": "kvkeep.errors",
    "UnsupportedModelError": "kvkeep.errors",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module and keep it (PEP 562)."""
    if name not in _NAME_TO_MODULE:
        raise AttributeError(f"module 'kvkeep' has no attribute {name!r}")
    value: object = getattr(import_module(_NAME_TO_MODULE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
