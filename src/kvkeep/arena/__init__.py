"""The device memory that attention reads, by BlockId."""

from kvkeep.arena.arena import Arena
from kvkeep.arena.base import GroupArena, Layout
from kvkeep.arena.groups import ArenaGroups, fit_blocks
from kvkeep.arena.layout import BlockLayout
from kvkeep.arena.native_words import NativeWordRows, native_arena
from kvkeep.arena.payloads import STATE_LAYOUT, Payloads
from kvkeep.arena.slots import Slots
from kvkeep.arena.split_arena import SplitArena
from kvkeep.arena.states import RecurrentState, StateArena
from kvkeep.arena.word_layout import WordLayout
from kvkeep.arena.words import TorchWordRows, WordArena, WordRows, WordRowsOf

__all__ = [
    "STATE_LAYOUT",
    "Arena",
    "ArenaGroups",
    "BlockLayout",
    "GroupArena",
    "Layout",
    "NativeWordRows",
    "Payloads",
    "RecurrentState",
    "Slots",
    "SplitArena",
    "StateArena",
    "TorchWordRows",
    "WordArena",
    "WordLayout",
    "WordRows",
    "WordRowsOf",
    "fit_blocks",
    "native_arena",
]
