"""Many requests, one model."""

from kvkeep.engine.engine import Engine
from kvkeep.engine.outputs import Choice, FinishReason, Output, Piece
from kvkeep.engine.sampler import Sampled, TokenLogprob

__all__ = ["Choice", "Engine", "FinishReason", "Output", "Piece", "Sampled", "TokenLogprob"]
