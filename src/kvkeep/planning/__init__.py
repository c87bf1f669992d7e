"""Load, compute or wait: decisions as plain values. No tensors."""

from kvkeep.planning.choose import choose_split
from kvkeep.planning.cost import ComputeCost, ComputeFit, LoadCost, LoadFit
from kvkeep.planning.coverage import (
    DEVICE,
    Coverage,
    CoveragePlan,
    GroupBlocks,
    Known,
    PartialHit,
    Run,
    StoredBlock,
    coverage_of,
    plan_coverage,
)
from kvkeep.planning.record import PlannerRecord, PlannerStats
from kvkeep.planning.spans import cut_spans
from kvkeep.planning.split_plan import MissingBlock, SplitKind, SplitPlan, TierLoad

__all__ = [
    "DEVICE",
    "ComputeCost",
    "ComputeFit",
    "Coverage",
    "CoveragePlan",
    "GroupBlocks",
    "Known",
    "LoadCost",
    "LoadFit",
    "MissingBlock",
    "PartialHit",
    "PlannerRecord",
    "PlannerStats",
    "Run",
    "SplitKind",
    "SplitPlan",
    "StoredBlock",
    "TierLoad",
    "choose_split",
    "coverage_of",
    "cut_spans",
    "plan_coverage",
]
