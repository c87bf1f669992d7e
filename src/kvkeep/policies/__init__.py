"""Which block goes first: eviction policies behind one contract."""

from collections.abc import Callable

from kvkeep.errors import ConfigError
from kvkeep.policies.base import EvictionPolicy, Item
from kvkeep.policies.lru import LRU
from kvkeep.policies.slru import SLRU

__all__ = ["LRU", "SLRU", "EvictionPolicy", "make_policy"]


def make_policy(name: str) -> EvictionPolicy[Item]:
    """A fresh policy by name: "lru" or "slru". Raises ConfigError for any other name."""
    name_to_factory: dict[str, Callable[[], EvictionPolicy[Item]]] = {"lru": LRU, "slru": SLRU}
    if name not in name_to_factory:
        raise ConfigError(f"policy={name!r} is unknown; choose one of {sorted(name_to_factory)}")
    return name_to_factory[name]()
