"""Traces of requests replayed without a model: what a device and its tiers would have found."""

from kvkeep.replay.belady import Clairvoyant, Optimum, ideal_hits
from kvkeep.replay.generate import WORKLOADS, Workload, generate
from kvkeep.replay.replay import Passed, PassedLevel, Replay
from kvkeep.replay.report import Comparison, ReplayReport, report_json
from kvkeep.replay.settings import ReplaySettings, ReplayTier, parse_capacity, parse_tier
from kvkeep.replay.trace import BLOCK_TOKENS, TraceRequest, read_trace, write_trace
from kvkeep.replay.visits import Visit, visits_of

__all__ = [
    "BLOCK_TOKENS",
    "WORKLOADS",
    "Clairvoyant",
    "Comparison",
    "Optimum",
    "Passed",
    "PassedLevel",
    "Replay",
    "ReplayReport",
    "ReplaySettings",
    "ReplayTier",
    "TraceRequest",
    "Visit",
    "Workload",
    "generate",
    "ideal_hits",
    "parse_capacity",
    "parse_tier",
    "read_trace",
    "report_json",
    "visits_of",
    "write_trace",
]
