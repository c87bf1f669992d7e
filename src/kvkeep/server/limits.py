"""How many jobs there may be at once, over all and by tenant."""

from collections import Counter

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError

__all__ = ["Seats"]

# Where so many jobs are under way, one ends within about a second.
_RETRY_AFTER_S = "1"


class Seats:
    """Counts the jobs that are waiting or running. Belongs to one event loop."""

    def __init__(self, *, max_jobs: int, max_per_tenant: int | None) -> None:
        self._max_jobs = max_jobs
        self._max_per_tenant = max_per_tenant
        self._tenant_to_jobs: Counter[TenantId] = Counter()
        self.num_taken = 0

    def take(self, tenant: Tenant) -> None:
        """Count one more job. Raises ApiError 429 when there are too many."""
        if self.num_taken >= self._max_jobs:
            raise _too_many(
                f"{self.num_taken} requests are waiting or running, and max_queued leaves room for no more"
            )
        held = self._tenant_to_jobs[tenant.tenant_id]
        if self._max_per_tenant is not None and held >= self._max_per_tenant:
            raise _too_many(
                f"{held} requests with this key are waiting or running "
                f"(max_requests_per_key={self._max_per_tenant})"
            )
        self._tenant_to_jobs[tenant.tenant_id] += 1
        self.num_taken += 1

    def give_back(self, tenant: Tenant) -> None:
        """Count one job less."""
        self.num_taken -= 1
        self._tenant_to_jobs[tenant.tenant_id] -= 1
        if not self._tenant_to_jobs[tenant.tenant_id]:
            del self._tenant_to_jobs[tenant.tenant_id]


def _too_many(message: str) -> ApiError:
    return ApiError(
        429,
        f"{message}; try again later",
        code="rate_limit_exceeded",
        headers={"retry-after": _RETRY_AFTER_S},
    )
