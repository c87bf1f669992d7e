"""Media below the device, by StoredKey.

What users and third parties need is here, and loaded on first use: a tier brings its own libraries with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvkeep.tiers.base import (
        Capabilities,
        Got,
        Labelled,
        Miss,
        MissCause,
        Occasion,
        Presence,
        PutOutcome,
        StoredObject,
        Tier,
        TierStats,
    )
    from kvkeep.tiers.settings import Disk, Host, Remote, TierSettings

__all__ = [
    "Capabilities",
    "Disk",
    "Got",
    "Host",
    "Labelled",
    "Miss",
    "MissCause",
    "Occasion",
    "Presence",
    "PutOutcome",
    "Remote",
    "StoredObject",
    "Tier",
    "TierSettings",
    "TierStats",
]

_OF_SETTINGS = ("Disk", "Host", "Remote", "TierSettings")


def __getattr__(name: str) -> object:
    """Load a public name from its module and keep it (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'kvkeep.tiers' has no attribute {name!r}")
    module = "settings" if name in _OF_SETTINGS else "base"
    value: object = getattr(import_module(f"kvkeep.tiers.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
