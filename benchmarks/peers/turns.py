"""Many sides that take turns, so that a machine whose speed drifts is as fast for one as for the next."""

from collections.abc import Callable, Mapping
from time import perf_counter, sleep

__all__ = ["take_turns"]

# Threads of the side before spin for a few milliseconds, on the cores that the next one needs.
PAUSE_S = 0.02


def take_turns(
    sides: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    warmups: int = 1,
    budget_s: float = float("inf"),
    at_least: int = 3,
    pause_s: float = PAUSE_S,
) -> dict[str, list[float]]:
    """Seconds of each side, round by round; entry `i` of all was measured one right after the other.

    A side gets the number of the round, warm-ups included, and returns its seconds. In each round another
    one begins. When `budget_s` is spent, rounds after the first `at_least` are left out.
    """
    start, names = perf_counter(), list(sides)
    name_to_seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmups + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            sleep(pause_s)
            seconds = sides[name](number)
            if number >= warmups:
                name_to_seconds[name].append(seconds)
        if number + 1 >= warmups + at_least and perf_counter() - start > budget_s:
            break
    return name_to_seconds
