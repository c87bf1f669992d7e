"""The device memory that attention reads, by BlockId."""

from kvkeep.arena.arena import Arena, Slots
from kvkeep.arena.groups import ArenaGroups, fit_blocks
from kvkeep.arena.layout import BlockLayout
from kvkeep.arena.states import RecurrentState, StateArena

__all__ = [
    "Arena",
    "ArenaGroups",
    "BlockLayout",
    "RecurrentState",
    "Slots",
    "StateArena",
    "fit_blocks",
]
