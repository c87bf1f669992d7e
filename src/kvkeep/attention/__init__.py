"""How a model reads the arena."""

from kvkeep.attention.base import AttentionBackend, AttentionTerms
from kvkeep.attention.gather import GatherAttention
from kvkeep.attention.inputs import GroupInputs, Item, ReadBatch, build_group_inputs
from kvkeep.attention.native import NativeAttention
from kvkeep.attention.reference import reference_attention

__all__ = [
    "AttentionBackend",
    "AttentionTerms",
    "GatherAttention",
    "GroupInputs",
    "Item",
    "NativeAttention",
    "ReadBatch",
    "build_group_inputs",
    "reference_attention",
]
