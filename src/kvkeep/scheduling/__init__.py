"""Who runs in a step, with how many tokens. No tensors."""

from kvkeep.scheduling.request import Request, RequestStatus
from kvkeep.scheduling.scheduler import PlannedWork, Scheduler, StepPlan

__all__ = ["PlannedWork", "Request", "RequestStatus", "Scheduler", "StepPlan"]
