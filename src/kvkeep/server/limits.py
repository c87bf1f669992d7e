"""How many jobs there may be at once, over all and by tenant; one for n outputs counts n times."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvkeep.server.auth import Tenant, TenantId
from kvkeep.server.errors import ApiError

__all__ = ["Seats", "TakenSeats", "too_many"]

# Where so many jobs are under way, one ends within about a second.
_RETRY_AFTER_S = "1"


class Seats:
    """Counts the jobs that are waiting or running. Belongs to one event loop."""

    def __init__(self, *, max_jobs: int, max_per_tenant: int | None) -> None:
        self._max_jobs = max_jobs
        self._max_per_tenant = max_per_tenant
        self._tenant_to_jobs: Counter[TenantId] = Counter()
        self.num_taken = 0

    def take(self, tenant: Tenant, num_outputs: int = 1, *, num_prompts: int = 1) -> None:
        """Count jobs, one for each prompt, which take a seat for each output; all of them or none.

        Raises ApiError 429 when there are too many, 400 for a request with more outputs than a tenant may
        have, or more prompts than there are seats. One with more outputs than there are seats has to come
        when nobody else is there.
        """
        self._refuse_misfits(num_outputs, num_prompts)
        num_seats = num_outputs * num_prompts
        if self.num_taken and self.num_taken + num_seats > self._max_jobs:
            raise too_many(
                f"{self.num_taken} requests are waiting or running, and max_queued leaves room for no more"
            )
        held = self._tenant_to_jobs[tenant.tenant_id]
        if self._max_per_tenant is not None and held + num_seats > self._max_per_tenant:
            raise too_many(
                f"{held} requests with this key are waiting or running "
                f"(max_requests_per_key={self._max_per_tenant})"
            )
        self._tenant_to_jobs[tenant.tenant_id] += num_seats
        self.num_taken += num_seats

    @contextmanager
    def taken(self, tenant: Tenant, num_outputs: int, num_prompts: int) -> Iterator["TakenSeats"]:
        """Take the seats of all prompts of a request at once; what no job has of them is given back."""
        self.take(tenant, num_outputs, num_prompts=num_prompts)
        seats = TakenSeats(self, num_outputs * num_prompts)
        try:
            yield seats
        finally:
            self.give_back(tenant, seats.num_left)

    def give_back(self, tenant: Tenant, num_outputs: int = 1) -> None:
        """Count one job less."""
        self.num_taken -= num_outputs
        self._tenant_to_jobs[tenant.tenant_id] -= num_outputs
        if not self._tenant_to_jobs[tenant.tenant_id]:
            del self._tenant_to_jobs[tenant.tenant_id]

    def _refuse_misfits(self, num_outputs: int, num_prompts: int) -> None:
        """Raise ApiError 400 for what would be refused at any other time as well."""
        most = self._max_per_tenant
        if num_prompts > self._max_jobs:
            raise ApiError(
                400,
                f"prompt has {num_prompts} entries, each a request of its own, and the server takes "
                f"{self._max_jobs} at once; send the list in parts of at most {self._max_jobs}",
                param="prompt",
            )
        if most is None or num_outputs * num_prompts <= most:
            return
        if num_prompts == 1 or num_outputs > most:
            raise ApiError(
                400,
                f"n={num_outputs} counts as so many requests, and max_requests_per_key={most}; ask for "
                "fewer outputs",
                param="n",
            )
        outputs = f" with n={num_outputs}" if num_outputs > 1 else ""
        raise ApiError(
            400,
            f"prompt has {num_prompts} entries{outputs}, which counts as {num_outputs * num_prompts} "
            f"requests, and max_requests_per_key={most}; send the list in parts of at most "
            f"{most // num_outputs}",
            param="prompt",
        )


class TakenSeats:
    """Seats that are taken together, for jobs that begin one after another."""

    def __init__(self, seats: Seats, num_left: int) -> None:
        self._seats = seats
        self.num_left = num_left

    def take(self, tenant: Tenant, num_outputs: int = 1) -> None:
        """Give seats to a job, which gives them back itself."""
        assert num_outputs <= self.num_left
        self.num_left -= num_outputs

    def give_back(self, tenant: Tenant, num_outputs: int = 1) -> None:
        """Count one job less."""
        self._seats.give_back(tenant, num_outputs)


def too_many(message: str) -> ApiError:
    """What a client is told that has to come again later."""
    return ApiError(
        429,
        f"{message}; try again later",
        code="rate_limit_exceeded",
        headers={"retry-after": _RETRY_AFTER_S},
    )
