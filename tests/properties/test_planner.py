"""Whatever is missing and whatever things cost: plans are whole, and no worse than simple ones."""

from random import Random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.planner_world import (
    Noise,
    World,
    best_of_all,
    best_of_family,
    carry_out,
    learn,
    missing_blocks,
)
from kvkeep.planning.choose import choose_split
from kvkeep.planning.cost import ComputeCost, LoadCost
from kvkeep.planning.split_plan import MissingBlock, SplitKind, SplitPlan, TierLoad
from kvkeep.spec import Span

NAMES = ("host", "disk", "remote")
BLOCK = 16


def seconds(least: float, most: float) -> st.SearchStrategy[float]:
    """Times of every size."""
    return st.floats(least, most, allow_nan=False)


@st.composite
def computes(draw: st.DrawFn) -> ComputeCost:
    """Machines from fast to slow, some without one of the three parts."""
    return ComputeCost(
        fixed_s=draw(st.sampled_from([0.003, 0.0, 0.1])),
        linear_s=draw(st.sampled_from([1e-3, 1e-2, 1e-4, 0.0])) * draw(seconds(0.5, 2)),
        quadratic_s=draw(st.sampled_from([0.0, 1e-6, 1e-5])) * draw(seconds(0.5, 2)),
    )


@st.composite
def tier_loads(draw: st.DrawFn) -> TierLoad:
    """Tiers from memory to the other end of the world; a block has about 1e5 bytes."""
    cost = LoadCost(
        latency_s=draw(st.sampled_from([0.0, 1e-4, 0.01, 1.0])),
        bytes_per_s=draw(st.sampled_from([1e5, 1e6, 3e6, 1e7, 1e8, 1e10])),
    )
    return TierLoad(cost, draw(st.sampled_from([0, 0, 0, 10**5, 10**8])))


HELD = st.sampled_from(
    [(), ("host",), ("disk",), ("remote",), ("host", "disk"), ("disk", "remote"), NAMES]
)


@st.composite
def missings(draw: st.DrawFn, most: int = 40) -> list[MissingBlock]:
    """Runs of blocks in order, with what is known lying between some; each run in some tiers or in none."""
    found: list[MissingBlock] = []
    at = draw(st.sampled_from([0, 160, 2000]))
    for _ in range(draw(st.sampled_from([4, 8, 2, 1, 0]))):
        at += draw(st.sampled_from([0, 0, 0, BLOCK]))
        tiers, num_bytes = draw(HELD), draw(st.sampled_from([10**4, 10**5, 10**6]))
        for _ in range(min(draw(st.sampled_from([2, 10, 1])), most - len(found))):
            found.append(MissingBlock(Span(at, at + BLOCK), num_bytes, tiers))
            at += BLOCK
    return found


# Of some tier, now and then, nobody knows what it costs.
LOADS = st.builds(
    lambda loads, unknown: {name: load for name, load in loads.items() if name != unknown},
    st.fixed_dictionaries({name: tier_loads() for name in NAMES}),
    st.sampled_from(["", "", "", *NAMES]),
)
STEPS = st.sampled_from([BLOCK, 100, 2048])


def planned(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
    *,
    hysteresis: float = 0.05,
    others_weight: float = 0.0,
) -> SplitPlan:
    """A plan."""
    return choose_split(
        blocks,
        compute,
        loads,
        step_tokens=step_tokens,
        hysteresis=hysteresis,
        others_weight=others_weight,
    )


@given(missings(), computes(), LOADS, STEPS, st.sampled_from([0.0, 0.5, 50.0]))
def test_a_plan_covers_everything_once(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
    others_weight: float,
) -> None:
    """Each block from a tier that has it and whose cost is known, or computed; runs say the same."""
    plan = planned(blocks, compute, loads, step_tokens, others_weight=others_weight)

    assert len(plan.sources) == len(blocks)
    for block, source in zip(blocks, plan.sources, strict=True):
        assert source is None or (source in block.tiers and source in loads)
    from_runs = {at: run.source for run in plan.runs for at in range(run.start, run.stop)}
    from_blocks = {
        at: source
        for block, source in zip(blocks, plan.sources, strict=True)
        for at in range(block.span.start, block.span.stop)
    }
    assert from_runs == from_blocks
    assert sum(run.stop - run.start for run in plan.runs) == len(from_runs)
    assert all(a.stop <= b.start for a, b in zip(plan.runs, plan.runs[1:], strict=False))
    num_loaded = len(plan.sources) - plan.sources.count(None)
    assert (plan.kind is SplitKind.COMPUTE) == (num_loaded == 0)


@given(missings(), computes(), LOADS, STEPS)
def test_no_plan_is_predicted_to_be_worse_than_a_simple_one(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
) -> None:
    """Neither than loading all there is, nor than computing everything; alone it is as good as both."""
    plan = planned(blocks, compute, loads, step_tokens)

    assert plan.seconds <= min(plan.all_load_s, plan.all_compute_s) * (1 + 1e-9)
    assert plan.seconds >= max(plan.load_s, plan.compute_s) * (1 - 1e-9)
    simple = [block.span for block in blocks]
    least_s = compute.marginal_s(simple) + (compute.fixed_s if simple else 0)
    assert plan.all_compute_s >= least_s * (1 - 1e-9)


@given(missings(), computes(), LOADS, STEPS, seconds(0, 1000))
def test_however_busy_others_are_a_request_pays_a_tenth_at_most(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
    others_weight: float,
) -> None:
    """And nobody computes more for others' sake."""
    alone = planned(blocks, compute, loads, step_tokens, hysteresis=0.0)
    busy = planned(blocks, compute, loads, step_tokens, hysteresis=0.0, others_weight=others_weight)

    assert busy.seconds <= 1.1 * min(busy.all_load_s, busy.all_compute_s) * (1 + 1e-9)
    assert busy.compute_s <= alone.compute_s * (1 + 1e-9)


@given(missings(), computes(), LOADS, STEPS, seconds(1, 100))
def test_a_faster_machine_never_takes_longer(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
    factor: float,
) -> None:
    """What is cheaper to compute is planned to end no later."""
    faster = ComputeCost(
        fixed_s=compute.fixed_s / factor,
        linear_s=compute.linear_s / factor,
        quadratic_s=compute.quadratic_s / factor,
    )
    before = planned(blocks, compute, loads, step_tokens, hysteresis=0.0)
    after = planned(blocks, faster, loads, step_tokens, hysteresis=0.0)

    assert after.seconds <= before.seconds * (1 + 1e-9)


@given(missings(), computes(), tier_loads(), STEPS, seconds(1, 100))
def test_a_faster_tier_never_makes_it_later_nor_loads_less(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    load: TierLoad,
    step_tokens: int,
    factor: float,
) -> None:
    """With one tier, more bandwidth is more loading and less time."""
    cost = load.cost
    faster = TierLoad(
        LoadCost(latency_s=cost.latency_s / factor, bytes_per_s=cost.bytes_per_s * factor),
        load.queued_bytes,
    )
    before = planned(blocks, compute, {"disk": load}, step_tokens, hysteresis=0.0)
    after = planned(blocks, compute, {"disk": faster}, step_tokens, hysteresis=0.0)

    assert after.seconds <= before.seconds * (1 + 1e-9)


@given(missings(most=6), computes(), LOADS, STEPS)
def test_a_plan_can_be_carried_out_in_the_time_that_it_predicts(
    blocks: list[MissingBlock],
    compute: ComputeCost,
    loads: dict[str, TierLoad],
    step_tokens: int,
) -> None:
    """Event by event, with loads in order of position; an eager run may begin a step for every gap."""
    plan = planned(blocks, compute, loads, step_tokens)
    world = World(compute=compute, loads=loads, step_tokens=step_tokens)
    num_gaps = sum(run.source is None for run in plan.runs)
    more_s = compute.fixed_s * max(0, num_gaps - 1)

    assert carry_out(world, blocks, plan.sources) <= (plan.seconds + more_s) * (1 + 1e-9)


def random_world(chooser: Random, names: tuple[str, ...]) -> tuple[World, int]:
    """A model and tiers as they are found, and the bytes of a token."""
    speed = 10 ** chooser.uniform(11, 14)
    parameters, token_bytes = chooser.choice([(4e6, 2e4), (6e8, 1.1e5), (1.7e9, 2e5)])
    compute = ComputeCost(
        fixed_s=10 ** chooser.uniform(-3, -2),
        linear_s=2 * parameters / speed,
        quadratic_s=0.05 * token_bytes / speed,
    )
    loads = {
        name: TierLoad(
            LoadCost(
                latency_s=10 ** chooser.uniform(-4.5, -1.5),
                bytes_per_s=10 ** chooser.uniform(7, 9.8),
            )
        )
        for name in names
    }
    return World(compute=compute, loads=loads, step_tokens=2048), int(token_bytes)


def test_with_known_costs_plans_are_close_to_the_best_of_all_assignments() -> None:
    """Six blocks with any holes, in any tiers: two thousand assignments and more to choose from."""
    chooser, excesses = Random(1), []
    for _ in range(60):
        world, token_bytes = random_world(chooser, NAMES[:2])
        held = [chooser.choice([(), ("host",), ("disk",), ("host", "disk")]) for _ in range(6)]
        blocks = missing_blocks(
            chooser.randrange(4096), held, block_size=512, token_bytes=token_bytes
        )
        plan = planned(blocks, world.compute, dict(world.loads), world.step_tokens, hysteresis=0.0)
        excesses.append(carry_out(world, blocks, plan.sources) / best_of_all(world, blocks) - 1)

    assert mean(excesses) <= 0.03
    assert sorted(excesses)[len(excesses) // 2] <= 1e-9


@pytest.mark.parametrize("names", [("disk",), ("host", "disk")], ids=["one tier", "two tiers"])
def test_with_learnt_costs_the_regret_is_small(names: tuple[str, ...]) -> None:
    """Fitted to a few dozen noisy times, plans take at most a tenth longer than the best, nearly always."""
    chooser, regrets, slowdowns = Random(2), [], []
    for _ in range(60):
        world, token_bytes = random_world(chooser, names)
        learnt = learn(
            world,
            chooser,
            num_samples=80,
            most_tokens=8192,
            token_bytes=token_bytes,
            noise=Noise(),
        )
        num_blocks = chooser.choice([4, 16, 32])
        cut = chooser.randrange(num_blocks) if len(names) > 1 else 0
        held = [names[:1]] * cut + [names[-1:]] * (num_blocks - cut) + [()]
        blocks = missing_blocks(0, held, block_size=256, token_bytes=token_bytes)
        plan = planned(blocks, learnt.compute, dict(learnt.loads), world.step_tokens)
        took_s = carry_out(world, blocks, plan.sources)
        regrets.append(took_s / best_of_family(world, blocks) - 1)
        nearest = tuple(tiers[0] if tiers else None for tiers in held)
        compute_s = carry_out(world, blocks, (None,) * len(blocks))
        slowdowns.append(took_s / min(compute_s, carry_out(world, blocks, nearest)))

    assert mean(regrets) <= 0.05
    assert sorted(regrets)[int(0.95 * len(regrets))] <= 0.10
    assert max(slowdowns) <= 1.10
