"""Load, compute, or both from two ends: whichever is there first, under the costs that are known."""

from collections.abc import Sequence

import pytest

from kvkeep.planning.choose import choose_split
from kvkeep.planning.cost import ComputeCost, LoadCost
from kvkeep.planning.coverage import Run
from kvkeep.planning.record import PlannerRecord
from kvkeep.planning.split_plan import MissingBlock, SplitKind, SplitPlan, TierLoad
from kvkeep.spec import Span

# A second for each block of 10 tokens, wherever it lies.
SLOW = ComputeCost(fixed_s=0.0, linear_s=0.1, quadratic_s=0.0)
STEP = 1000


def blocks(*tiers: Sequence[str], start: int = 0, num_bytes: int = 100) -> list[MissingBlock]:
    """Blocks of 10 tokens one after another; a string stands for the one tier that has it."""
    return [
        MissingBlock(
            Span(start + 10 * at, start + 10 * at + 10),
            num_bytes,
            (names,) if isinstance(names, str) and names else tuple(names),
        )
        for at, names in enumerate(tiers)
    ]


def tier(seconds_per_block: float, latency_s: float = 0.0, queued_blocks: int = 0) -> TierLoad:
    """A tier of blocks of 100 bytes."""
    return TierLoad(
        LoadCost(latency_s=latency_s, bytes_per_s=100 / seconds_per_block), 100 * queued_blocks
    )


def choose(
    missing: Sequence[MissingBlock],
    loads: dict[str, TierLoad],
    compute: ComputeCost = SLOW,
    *,
    others_weight: float = 0.0,
    hysteresis: float = 0.05,
    step_tokens: int = STEP,
) -> SplitPlan:
    """A plan."""
    return choose_split(
        missing,
        compute,
        loads,
        step_tokens=step_tokens,
        others_weight=others_weight,
        hysteresis=hysteresis,
    )


def test_a_fast_tier_is_loaded_from() -> None:
    """Nothing is computed that comes sooner."""
    plan = choose(blocks(*["host"] * 10), {"host": tier(0.001)})

    assert plan.kind is SplitKind.LOAD
    assert plan.runs == (Run(0, 100, "host"),)
    assert plan.seconds == pytest.approx(0.01)
    assert plan.all_load_s == pytest.approx(0.01)
    assert plan.all_compute_s == pytest.approx(10)
    assert plan.compute_s == 0


def test_a_slow_tier_is_not_waited_for() -> None:
    """Its blocks are computed, as if it were not there."""
    plan = choose(blocks(*["far"] * 10), {"far": tier(100)})

    assert plan.kind is SplitKind.COMPUTE
    assert plan.runs == (Run(0, 100, None),)
    assert plan.seconds == pytest.approx(10)
    assert plan.load_s == 0


def test_both_ends_meet_in_the_middle() -> None:
    """Equally fast, each does half, and it takes half as long."""
    plan = choose(blocks(*["disk"] * 10), {"disk": tier(1)})

    assert plan.kind is SplitKind.SPLIT
    assert plan.runs == (Run(0, 50, None), Run(50, 100, "disk"))
    assert plan.seconds == pytest.approx(5)
    assert plan.compute_s == pytest.approx(5)
    assert plan.load_s == pytest.approx(5)


def test_the_middle_moves_with_the_speeds() -> None:
    """A tier three times as fast loads three quarters; attention moves it to the front."""
    linear = choose(blocks(*["disk"] * 40), {"disk": tier(1 / 3)})
    attention = ComputeCost(fixed_s=0.0, linear_s=0.0, quadratic_s=0.0005)
    quadratic = choose(blocks(*["disk"] * 40), {"disk": tier(1)}, attention)

    assert linear.runs == (Run(0, 100, None), Run(100, 400, "disk"))
    # m^2 / 4000 = (400 - m) / 10 at 253: the cheap front is longer than the dear back.
    assert quadratic.runs[0].stop == 250
    assert quadratic.seconds == pytest.approx(250**2 / 4000)


def test_what_is_queued_counts() -> None:
    """A tier that is busy is as good as a slow one."""
    idle = choose(blocks(*["disk"] * 10), {"disk": tier(0.1)})
    busy = choose(blocks(*["disk"] * 10), {"disk": tier(0.1, queued_blocks=1000)})

    assert idle.kind is not SplitKind.COMPUTE
    assert busy.kind is SplitKind.COMPUTE


def test_a_hit_that_is_shorter_than_its_latency_is_ignored() -> None:
    """One block is computed sooner than a far store answers; a hundred are not."""
    far = {"far": tier(0.001, latency_s=3)}

    assert choose(blocks("far"), far).kind is SplitKind.COMPUTE
    assert choose(blocks(*["far"] * 100), far).kind is not SplitKind.COMPUTE


def test_what_nobody_has_is_computed() -> None:
    """In front of loads beside them, behind them after them."""
    loads = {"disk": tier(1)}

    front = choose(blocks("", "", "disk", "disk"), loads)
    behind = choose(blocks("disk", "disk", "", ""), {"disk": tier(0.5)})

    assert front.runs == (Run(0, 20, None), Run(20, 40, "disk"))
    assert front.seconds == pytest.approx(2)
    assert behind.runs == (Run(0, 20, "disk"), Run(20, 40, None))
    assert behind.seconds == pytest.approx(3)
    assert choose(blocks("", ""), {}).kind is SplitKind.COMPUTE
    assert choose([], loads).seconds == 0


def test_tiers_load_at_the_same_time() -> None:
    """Each is a server of its own."""
    plan = choose(blocks(*["host"] * 5, *["disk"] * 5), {"host": tier(0.01), "disk": tier(0.01)})

    assert plan.runs == (Run(0, 50, "host"), Run(50, 100, "disk"))
    assert plan.seconds == pytest.approx(0.05)


def test_a_slow_tier_behind_a_fast_one_is_split_alone() -> None:
    """The near part is loaded in no time, then what is far is computed and loaded from both ends."""
    plan = choose(blocks(*["host"] * 10, *["far"] * 10), {"host": tier(0.001), "far": tier(1)})

    assert plan.runs == (Run(0, 100, "host"), Run(100, 150, None), Run(150, 200, "far"))
    assert plan.seconds == pytest.approx(5, rel=0.01)


def test_a_slow_tier_among_fast_ones_is_left_out() -> None:
    """Only its blocks are computed."""
    plan = choose(blocks("host", "far", "host"), {"host": tier(0.01), "far": tier(50)})

    assert plan.sources == ("host", None, "host")
    assert plan.seconds == pytest.approx(1, rel=0.05)


def test_of_several_tiers_that_have_a_block_the_fastest_gives_it() -> None:
    """Unless it is busy."""
    both = blocks(*[("host", "far")] * 4)

    idle = choose(both, {"host": tier(0.01), "far": tier(0.05)})
    busy = choose(both, {"host": tier(0.01, queued_blocks=1000), "far": tier(0.05)})

    assert set(idle.sources) == {"host"}
    assert set(busy.sources) == {"far"}


def test_a_tier_of_unknown_cost_is_not_used() -> None:
    """Nobody has said what it takes."""
    assert choose(blocks("tape", "tape"), {"host": tier(1)}).sources == (None, None)


def test_every_step_costs_its_fixed_part() -> None:
    """A long front takes several steps, a rest behind loads one more."""
    compute = ComputeCost(fixed_s=1.0, linear_s=0.1, quadratic_s=0.0)

    plan = choose(blocks(*[""] * 10), {}, compute, step_tokens=30)
    rest = choose(blocks("disk", ""), {"disk": tier(0.01)}, compute)

    assert plan.seconds == pytest.approx(10 + 4)
    assert rest.seconds == pytest.approx(0.01 + 2)


def test_a_split_must_be_worth_it() -> None:
    """What is only a little better than a simple plan is not chosen, since no prediction is that good."""
    missing, loads = blocks(*["disk"] * 100), {"disk": tier(0.03)}

    eager = choose(missing, loads, hysteresis=0.0)
    calm = choose(missing, loads, hysteresis=0.05)

    assert eager.kind is SplitKind.SPLIT
    assert calm.kind is SplitKind.LOAD
    assert eager.seconds < calm.seconds <= eager.seconds * 1.05


def test_others_who_wait_make_computing_dearer() -> None:
    """But this request pays no more than a tenth for them."""
    missing = blocks(*["disk"] * 10)

    alone = choose(missing, {"disk": tier(1.05)})
    busy = choose(missing, {"disk": tier(1.05)}, others_weight=100)
    hopeless = choose(missing, {"disk": tier(1.3)}, others_weight=100)

    assert alone.kind is SplitKind.SPLIT
    assert busy.kind is SplitKind.LOAD
    assert busy.seconds == pytest.approx(10.5)
    assert hopeless.seconds <= 1.1 * min(hopeless.all_load_s, hopeless.all_compute_s)
    assert hopeless.compute_s < hopeless.all_compute_s


def test_blocks_may_lie_apart() -> None:
    """What is on the device between them is in no plan."""
    missing = [*blocks("host"), *blocks("host", start=50), *blocks("", start=60)]

    plan = choose(missing, {"host": tier(0.01)})

    assert plan.runs == (Run(0, 10, "host"), Run(50, 60, "host"), Run(60, 70, None))


# ---------------------------------------------------------------------------------------- record


def test_decisions_and_their_errors_are_counted() -> None:
    """By kind; predicted against actual seconds, each plan's error as a share of what it took."""
    record = PlannerRecord()
    load = choose(blocks(*["host"] * 10), {"host": tier(0.1)})
    split = choose(blocks(*["disk"] * 10), {"disk": tier(1)})
    assert record.stats.mean_error is None

    for plan in (load, load, split):
        record.decide(plan)
    record.finish(load, 2 * load.seconds)
    record.finish(split, split.seconds)
    record.finish(split, 0.0)

    stats = record.stats
    assert stats.num_decisions == {"load": 2, "compute": 0, "split": 1}
    assert stats.num_finished == 2
    assert stats.predicted_s == pytest.approx(load.seconds + split.seconds)
    assert stats.actual_s == pytest.approx(2 * load.seconds + split.seconds)
    assert stats.mean_error == pytest.approx(0.25)
