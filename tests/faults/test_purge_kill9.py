"""kill -9 in the middle of purges, a few times; `python -m tests.faults.purge_kill9` does more."""

import pytest

from tests.faults.purge_kill9 import run

KILLS = 12
BUDGET_S = 60.0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_purge_that_is_killed_is_finished_by_the_next_start() -> None:
    """Nothing of it is served, nothing else is lost, and nothing is counted twice."""
    counts = run(kills=KILLS, seed=0, budget_s=BUDGET_S)

    assert counts.num_kills > 1
    assert counts.num_midway > 0
