"""How long an eviction policy takes: a policy around a policy, with a clock."""

from collections.abc import Callable, Sequence
from time import perf_counter_ns

from kvkeep.policies import EvictionPolicy
from kvkeep.policies.base import Item

__all__ = ["TimedPolicy"]


class TimedPolicy(EvictionPolicy[Item]):
    """Decides as `policy` does, and adds up the time spent in it."""

    def __init__(
        self, policy: EvictionPolicy[Item], clock: Callable[[], int] = perf_counter_ns
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._spent_ns = 0

    @property
    def spent_s(self) -> float:
        """Seconds inside the policy so far."""
        return self._spent_ns / 1e9

    def insert(self, items: Sequence[Item]) -> None:
        start = self._clock()
        self._policy.insert(items)
        self._spent_ns += self._clock() - start

    def remove(self, items: Sequence[Item]) -> None:
        start = self._clock()
        self._policy.remove(items)
        self._spent_ns += self._clock() - start

    def forget(self, items: Sequence[Item]) -> None:
        start = self._clock()
        self._policy.forget(items)
        self._spent_ns += self._clock() - start

    def evict(self, num_items: int) -> list[Item] | None:
        start = self._clock()
        evicted = self._policy.evict(num_items)
        self._spent_ns += self._clock() - start
        return evicted

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, item: object) -> bool:
        return item in self._policy
