"""Which block goes first: eviction policies behind one contract."""

from collections.abc import Callable
from typing import cast

from kvkeep.config.extensions import ExtensionGroup, find_extension
from kvkeep.errors import ConfigError
from kvkeep.policies.base import EvictionPolicy, Item
from kvkeep.policies.gdsf import GDSF
from kvkeep.policies.lru import LRU
from kvkeep.policies.ranked import DEFAULT_RANK, FIRST_RANK, Ranked
from kvkeep.policies.s3fifo import S3FIFO
from kvkeep.policies.slru import SLRU

__all__ = [
    "DEFAULT_RANK",
    "FIRST_RANK",
    "GDSF",
    "LRU",
    "S3FIFO",
    "SLRU",
    "EvictionPolicy",
    "Ranked",
    "make_policy",
]


def make_policy(name: str, *, by_content: bool = False) -> EvictionPolicy[Item]:
    """A fresh policy by name: "lru", "slru", "gdsf", "s3fifo", or one of an installed package.

    `by_content` says that items name contents, as below the device, and not places that get new ones: what a
    policy remembers of an item that it evicted then still holds when the item comes back. Raises ConfigError
    for a name that nobody has, and for what is no policy.
    """
    name_to_factory: dict[str, Callable[[], EvictionPolicy[Item]]] = {
        "lru": LRU,
        "slru": SLRU,
        "gdsf": GDSF,
        "s3fifo": lambda: S3FIFO(remembers_evicted=by_content),
    }
    if name in name_to_factory:
        return name_to_factory[name]()
    found = find_extension(ExtensionGroup.POLICIES, name, built_in=list(name_to_factory))
    policy = found() if callable(found) else found
    if not isinstance(policy, EvictionPolicy):
        raise ConfigError(
            f"policy={name!r} makes {policy!r:.80}, which is no EvictionPolicy; update the package it is from"
        )
    return cast("EvictionPolicy[Item]", policy)
