"""Tiers, codecs and policies of other people, found by name through entry points of installed packages.

A package says in its pyproject.toml

    [project.entry-points."kvkeep.tiers"]
    tape = "kvkeep_tape:Tape"

and `tape` is a kind of tier from then on. Nothing is loaded before its name is asked for.
"""

from collections.abc import Collection
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points

from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError

__all__ = ["ExtensionGroup", "extension_names", "find_extension"]


class ExtensionGroup(StrEnum):
    """What others may add, by the name of the entry points' group."""

    TIERS = "kvkeep.tiers"  # a class of settings with `open`, as kvkeep.tiers.Host
    CODECS = "kvkeep.codecs"
    POLICIES = "kvkeep.policies"  # called without arguments for a fresh EvictionPolicy

    @property
    def noun(self) -> str:
        """One of the group, in words."""
        return {"tiers": "tier", "codecs": "codec", "policies": "policy"}[self.rpartition(".")[2]]


def extension_names(group: ExtensionGroup) -> list[str]:
    """The names that installed packages offer."""
    return sorted({point.name for point in entry_points(group=group)})


def find_extension(group: ExtensionGroup, name: str, *, built_in: Collection[str] = ()) -> object:
    """Load what an installed package offers under `name`.

    Raises ConfigError for a name that nobody has, naming the nearest of all there are, `built_in` among
    them; for one that several packages have; and for one that cannot be loaded, naming the package.
    """
    points = {(_package(p), p.value): p for p in entry_points(group=group, name=name)}
    if not points:
        known = sorted({*built_in, *extension_names(group)})
        hint = nearest_hint(name, known)
        # A hint that names none in particular names all.
        all_known = f"known: {', '.join(known)}; " if hint.endswith("?") else ""
        raise ConfigError(
            f"{group.noun}={name!r} is not known; {hint} ({all_known}packages add more through the entry "
            f"points {group!s})"
        )
    if len(points) > 1:
        packages = " and ".join(sorted({_package(point) for point in points.values()}))
        raise ConfigError(f"{group.noun}={name!r} is offered by {packages}; uninstall all but one")
    (point,) = points.values()
    try:
        return point.load()
    except Exception as error:
        raise ConfigError(
            f"{group.noun}={name!r} of {_package(point)} cannot be loaded from {point.value} "
            f"({type(error).__name__}: {error}); update or uninstall that package"
        ) from error


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
