"""Labels of one object that several write: what it is to bear, by what all of them have changed."""

from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import TypeVar

from kvkeep.cache.lifetimes.labels import Labels, merge_labels

__all__ = ["is_stricter", "left_of", "revised_labels"]

_Name = TypeVar("_Name")


def revised_labels(
    theirs: Labels | None, ours: Labels, base: Labels | None, now_s: float
) -> Labels:
    """Our labels and those that a store has, both of which began as `base` (None: that is not known).

    What one of the two has added or taken away is so; of two lives the longer holds. A life that is over
    is not gone on with.
    """
    if theirs is None or theirs.namespace != ours.namespace or theirs.ends_at <= now_s:
        return ours
    if base is None:
        return merge_labels(theirs, ours)
    return replace(
        merge_labels(theirs, ours),
        sessions=_merged(theirs.sessions, ours.sessions, base.sessions),
        tags=_merged(theirs.tags, ours.tags, base.tags),
        pins=_merged(theirs.pins, ours.pins, base.pins),
        contexts=_merged(theirs.contexts, ours.contexts, base.contexts),
    ).bounded()


def left_of(base: Labels, ours: Labels) -> Labels:
    """A base by which all that we have is added, and what we have no more is taken away."""
    return replace(
        base,
        sessions=base.sessions - ours.sessions,
        tags=base.tags - ours.tags,
        pins=base.pins - ours.pins,
        contexts=base.contexts - ours.contexts,
    )


def is_stricter(old: Labels | None, new: Labels) -> bool:
    """Whether a block with the old labels would be kept, or served, where the new ones forbid it."""
    if old is None:
        return True
    is_left = not new.is_shared and not old.sessions <= new.sessions
    is_freed = bool(old.pins) and not new.pins
    return not new.tags <= old.tags or is_left or is_freed or new.expires_at < old.expires_at


def _merged(
    theirs: AbstractSet[_Name], ours: AbstractSet[_Name], base: AbstractSet[_Name]
) -> frozenset[_Name]:
    return frozenset((theirs - (base - ours)) | (ours - base))
