"""Load, compute or wait: decisions as plain values. No tensors."""

from kvkeep.planning.coverage import (
    Coverage,
    CoveragePlan,
    GroupBlocks,
    PartialHit,
    Run,
    coverage_of,
    plan_coverage,
)
from kvkeep.planning.spans import cut_spans

__all__ = [
    "Coverage",
    "CoveragePlan",
    "GroupBlocks",
    "PartialHit",
    "Run",
    "coverage_of",
    "cut_spans",
    "plan_coverage",
]
