"""How many jobs there may be at once, over all and by tenant; one for n outputs counts n times."""

from collections import Counter

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError

__all__ = ["Seats", "too_many"]

# Where so many jobs are under way, one ends within about a second.
_RETRY_AFTER_S = "1"


class Seats:
    """Counts the jobs that are waiting or running. Belongs to one event loop."""

    def __init__(self, *, max_jobs: int, max_per_tenant: int | None) -> None:
        self._max_jobs = max_jobs
        self._max_per_tenant = max_per_tenant
        self._tenant_to_jobs: Counter[TenantId] = Counter()
        self.num_taken = 0

    def take(self, tenant: Tenant, num_outputs: int = 1) -> None:
        """Count a job, which takes a seat for each output.

        Raises ApiError 429 when there are too many, 400 for one with more outputs than a tenant may have. One
        with more outputs than there are seats has to come when nobody else is there.
        """
        if self._max_per_tenant is not None and num_outputs > self._max_per_tenant:
            raise ApiError(
                400,
                f"n={num_outputs} counts as so many requests, and max_requests_per_key="
                f"{self._max_per_tenant}; ask for fewer outputs",
                param="n",
            )
        if self.num_taken and self.num_taken + num_outputs > self._max_jobs:
            raise too_many(
                f"{self.num_taken} requests are waiting or running, and max_queued leaves room for no more"
            )
        held = self._tenant_to_jobs[tenant.tenant_id]
        if self._max_per_tenant is not None and held + num_outputs > self._max_per_tenant:
            raise too_many(
                f"{held} requests with this key are waiting or running "
                f"(max_requests_per_key={self._max_per_tenant})"
            )
        self._tenant_to_jobs[tenant.tenant_id] += num_outputs
        self.num_taken += num_outputs

    def give_back(self, tenant: Tenant, num_outputs: int = 1) -> None:
        """Count one job less."""
        self.num_taken -= num_outputs
        self._tenant_to_jobs[tenant.tenant_id] -= num_outputs
        if not self._tenant_to_jobs[tenant.tenant_id]:
            del self._tenant_to_jobs[tenant.tenant_id]


def too_many(message: str) -> ApiError:
    """What a client is told that has to come again later."""
    return ApiError(
        429,
        f"{message}; try again later",
        code="rate_limit_exceeded",
        headers={"retry-after": _RETRY_AFTER_S},
    )
