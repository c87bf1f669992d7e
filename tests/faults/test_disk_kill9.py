"""kill -9 at random instants, for a minute or so; `python -m tests.faults.kill9` does more."""

import pytest

from tests.faults.kill9 import SCENES, run

KILLS = 300
BUDGET_S = 100.0


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_disk_that_is_killed_holds_what_it_says() -> None:
    """Books equal to files, no file unfinished, the bound kept, every byte right, nothing done is undone."""
    counts = run(SCENES, kills=KILLS, seed=0, budget_s=BUDGET_S)

    assert counts.num_kills > len(SCENES)
    assert counts.num_objects > 100
    assert counts.num_checked_bytes > 1_000_000
