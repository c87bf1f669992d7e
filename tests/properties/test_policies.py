"""Every eviction policy against a slow one that says what it means: lists, scans and no cleverness."""

from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvkeep.policies import GDSF, LRU, S3FIFO, SLRU, EvictionPolicy

NUM_ITEMS = 24

# A kind of call, and numbers from which its items are chosen.
Step = tuple[str, list[int]]
KINDS = ("insert", "remove", "reuse", "evict", "forget")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", *KINDS]),
        st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=8),
    ),
    max_size=80,
)


class Slow:
    """What all slow policies share: which items there are, and which were there and are in use."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.used: set[int] = set()

    def __len__(self) -> int:
        return len(self.order)

    def __contains__(self, item: object) -> bool:
        return item in self.order

    def insert(self, items: Sequence[int]) -> None:
        """The last of a chain is the first to go."""
        for item in reversed(items):
            self.enter(item, is_known=item in self.used)
            self.used.discard(item)

    def enter(self, item: int, *, is_known: bool) -> None:
        """Put one item in its place."""
        self.order.append(item)

    def remove(self, items: Sequence[int]) -> None:
        """Items are used."""
        for item in items:
            self.order.remove(item)
            self.used.add(item)

    def forget(self, items: Sequence[int]) -> None:
        """Items lose their content."""
        for item in items:
            self.used.discard(item)
            if item in self.order:
                self.order.remove(item)

    def evict_one(self) -> int:
        """The next to go."""
        return self.order.pop(0)

    def evict(self, num_items: int) -> list[int] | None:
        """All or nothing."""
        if num_items > len(self.order):
            return None
        return [self.evict_one() for _ in range(num_items)]


class SlowGDSF(Slow):
    """The least of age + uses * cost, of equals the one inserted first."""

    def __init__(self, cost_of: Callable[[int], float]) -> None:
        super().__init__()
        self.cost_of = cost_of
        self.age = 0.0
        self.uses: dict[int, int] = {}
        self.values: dict[int, float] = {}

    def enter(self, item: int, *, is_known: bool) -> None:
        self.uses[item] = self.uses[item] + 1 if is_known else 1
        self.values[item] = self.age + self.uses[item] * self.cost_of(item)
        self.order.append(item)

    def evict_one(self) -> int:
        victim = min(self.order, key=lambda item: (self.values[item], self.order.index(item)))
        self.order.remove(victim)
        self.age = self.values[victim]
        return victim


class SlowSLRU(Slow):
    """`order` has probation first; the last `num_protected` of it are protected."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.protected: list[int] = []

    def insert(self, items: Sequence[int]) -> None:
        known = [item for item in items if item in self.used]
        new = [item for item in items if item not in self.used]
        probation = [item for item in self.order if item not in self.protected]
        probation += reversed(new)
        self.protected += reversed(known)
        self.used.difference_update(known)
        most = int(self.share * (len(probation) + len(self.protected)))
        while len(self.protected) > most:
            probation.append(self.protected.pop(0))
        self.order = probation + self.protected

    def remove(self, items: Sequence[int]) -> None:
        super().remove(items)
        self.protected = [item for item in self.protected if item in self.order]

    def forget(self, items: Sequence[int]) -> None:
        super().forget(items)
        self.protected = [item for item in self.protected if item in self.order]

    def evict_one(self) -> int:
        victim = super().evict_one()
        self.protected = [item for item in self.protected if item != victim]
        return victim


class SlowS3FIFO(Slow):
    """Two lists and a memory; `order` is kept only for its members."""

    def __init__(self, *, remembers: bool) -> None:
        super().__init__()
        self.remembers = remembers
        self.small: list[int] = []
        self.main: list[int] = []
        self.uses: dict[int, int] = {}
        self.ghosts: list[int] = []
        # Where an item in use came from.
        self.was_main: set[int] = set()

    def enter(self, item: int, *, is_known: bool) -> None:
        self.order.append(item)
        self.uses[item] = min(3, self.uses[item] + 1) if is_known else 0
        if (is_known and item in self.was_main) or item in self.ghosts:
            self.main.append(item)
        else:
            self.small.append(item)
        self.was_main.discard(item)
        if item in self.ghosts:
            self.ghosts.remove(item)

    def remove(self, items: Sequence[int]) -> None:
        super().remove(items)
        self.was_main.update(item for item in items if item in self.main)
        self._drop(items)

    def forget(self, items: Sequence[int]) -> None:
        super().forget(items)
        self.was_main.difference_update(items)
        self.ghosts = [item for item in self.ghosts if item not in items]
        self._drop(items)

    def _drop(self, items: Sequence[int]) -> None:
        self.small = [item for item in self.small if item not in items]
        self.main = [item for item in self.main if item not in items]

    def evict_one(self) -> int:
        while True:
            num_all = len(self.small) + len(self.main)
            if self.small and (not self.main or len(self.small) >= 0.1 * num_all):
                item = self.small.pop(0)
                if self.uses[item] > 1:
                    self.uses[item] = 0
                    self.main.append(item)
                    continue
                if self.remembers:
                    self.ghosts = [*self.ghosts, item][-num_all:]
                break
            item = self.main.pop(0)
            if self.uses[item] == 0:
                break
            self.uses[item] -= 1
            self.main.append(item)
        self.order.remove(item)
        return item


def cost(item: int) -> float:
    """Some items are four times as dear as others, in numbers that floats hold exactly."""
    return 1.0 + item % 4


PAIRS: dict[str, Callable[[], tuple[EvictionPolicy[int], Slow]]] = {
    "lru": lambda: (LRU(), Slow()),
    "slru": lambda: (SLRU(), SlowSLRU(0.2)),
    "slru, more protected": lambda: (SLRU(protected_share=0.8), SlowSLRU(0.8)),
    "gdsf": lambda: (GDSF(), SlowGDSF(lambda _: 1.0)),
    "gdsf with costs": lambda: (GDSF(cost_of=cost), SlowGDSF(cost)),
    "s3fifo": lambda: (S3FIFO(), SlowS3FIFO(remembers=False)),
    "s3fifo of contents": lambda: (S3FIFO(remembers_evicted=True), SlowS3FIFO(remembers=True)),
}


def call(policy: EvictionPolicy[int] | Slow, step: Step, evictable: set[int]) -> list[int] | None:
    """Make the call that a step stands for, with the items for which the contract allows it."""
    kind, numbers = step
    match kind:
        case "insert":
            policy.insert([item for item in numbers if item not in evictable])
        case "remove":
            policy.remove([item for item in numbers if item in evictable])
        case "reuse":
            items = [item for item in numbers if item in evictable]
            policy.remove(items)
            policy.insert(items)
        case "forget":
            policy.forget(numbers)
        case _:
            return policy.evict(len(numbers))
    return None


def history(policy: EvictionPolicy[int] | Slow, steps: list[Step]) -> list[object]:
    """The victims of every call in their order, what is left after it, and all the rest at the end."""
    seen: list[object] = []
    for step in steps:
        victims = call(policy, step, {item for item in range(NUM_ITEMS) if item in policy})
        left = {item for item in range(NUM_ITEMS) if item in policy}
        seen.append((victims, left, len(policy)))
    return [*seen, policy.evict(len(policy))]


@pytest.mark.parametrize("name", PAIRS)
@given(steps=STEPS)
def test_a_policy_decides_as_the_slow_one(name: str, steps: list[Step]) -> None:
    """Short histories, which are made as simple as possible when they fail."""
    fast, slow = PAIRS[name]()
    assert history(fast, steps) == history(slow, steps)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", PAIRS)
def test_a_policy_decides_as_the_slow_one_for_long(name: str, seed: int) -> None:
    """Long histories, in which items come back after most others have gone."""
    rng = Random(f"{name}:{seed}")
    kinds = rng.choices(KINDS, weights=[6, 2, 6, 4, 1], k=600)
    steps = [(kind, rng.sample(range(NUM_ITEMS), rng.randint(0, 4))) for kind in kinds]
    fast, slow = PAIRS[name]()
    assert history(fast, steps) == history(slow, steps)
