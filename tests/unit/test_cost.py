"""Costs are learnt from noisy times, stay sensible, and follow the machine when it changes."""

from itertools import pairwise
from math import exp
from random import Random
from statistics import mean

import pytest

from kvkeep.planning.cost import ComputeCost, ComputeFit, LoadCost, LoadFit
from kvkeep.spec import Span

TRUE = ComputeCost(fixed_s=0.004, linear_s=2e-5, quadratic_s=3e-9)
# Ten times off in every direction.
GUESS = ComputeCost(fixed_s=0.0004, linear_s=2e-4, quadratic_s=3e-10)
SPANS = [
    Span(0, 1),
    Span(4000, 4001),
    Span(0, 512),
    Span(2048, 4096),
    Span(0, 4096),
    Span(9000, 9100),
]


def error(found: ComputeCost, true: ComputeCost, spans: list[Span] | None = None) -> float:
    """The largest relative error over steps of all sizes."""
    return max(abs(found.seconds([span]) / true.seconds([span]) - 1) for span in spans or SPANS)


def random_span(chooser: Random) -> Span:
    """Short and long, early and late."""
    start = chooser.randrange(8192)
    return Span(start, start + int(2 ** chooser.uniform(0, 11)))


def feed(
    fit: ComputeFit,
    true: ComputeCost,
    chooser: Random,
    num_steps: int,
    *,
    sigma: float = 0.0,
    outliers: float = 0.0,
) -> None:
    """Have it observe steps; `outliers` of them take ten times as long."""
    for _ in range(num_steps):
        span = random_span(chooser)
        seconds = true.seconds([span]) * exp(chooser.gauss(0, sigma))
        fit.observe([span], seconds * (10 if chooser.random() < outliers else 1))


def test_the_formula_is_that_of_the_documentation() -> None:
    """T(a, b) = fixed + linear (b - a) + quadratic (b^2 - a^2) / 2, once per step."""
    cost = ComputeCost(fixed_s=1.0, linear_s=0.5, quadratic_s=0.25)

    assert cost.seconds([Span(2, 4)]) == 1 + 0.5 * 2 + 0.25 * (16 - 4) / 2
    assert cost.seconds([Span(0, 1), Span(2, 4)]) == cost.seconds([Span(2, 4)]) + 0.5 + 0.125
    assert cost.seconds([]) == cost.seconds([Span(3, 3)]) == 0
    assert cost.marginal_s([Span(2, 4)]) == cost.seconds([Span(2, 4)]) - 1


def test_before_anything_is_seen_the_guess_counts() -> None:
    """And what was not seen at all is still guessed afterwards."""
    fit = ComputeFit(GUESS)

    assert fit.num_observed == 0
    assert error(fit.cost, GUESS) < 1e-9


def test_exact_times_give_exact_costs() -> None:
    """However wrong the guess was."""
    fit = ComputeFit(GUESS)
    feed(fit, TRUE, Random(1), 60)

    assert fit.num_observed == 60
    assert error(fit.cost, TRUE) < 0.02


def test_noise_and_outliers_do_not_wreck_the_fit() -> None:
    """15 % of noise, and every fifth step ten times too long, as on a machine that others use."""
    errors = []
    for seed in range(10):
        fit = ComputeFit(GUESS)
        feed(fit, TRUE, Random(seed), 200, sigma=0.15, outliers=0.2)
        errors.append(error(fit.cost, TRUE))

    assert mean(errors) < 0.09
    assert max(errors) < 0.25


def test_one_absurd_time_at_the_start_is_forgotten() -> None:
    """The first step compiles, loads and faults pages in."""
    fit = ComputeFit(GUESS)
    fit.observe([Span(0, 512)], 60.0)
    feed(fit, TRUE, Random(2), 60, sigma=0.1)

    assert error(fit.cost, TRUE) < 0.15


def test_thousands_of_short_steps_do_not_make_it_forget_the_long_ones() -> None:
    """Decoding goes on for hours between two long prompts."""
    fit, chooser = ComputeFit(GUESS), Random(3)
    feed(fit, TRUE, chooser, 100, sigma=0.1)
    for _ in range(5000):
        start = chooser.randrange(4000)
        span = Span(start, start + 1)
        fit.observe([span], TRUE.seconds([span]) * exp(chooser.gauss(0, 0.1)))

    assert error(fit.cost, TRUE) < 0.15


def test_a_machine_that_becomes_slower_is_followed() -> None:
    """What was an outlier is the truth once it goes on."""
    slower = ComputeCost(fixed_s=0.012, linear_s=6e-5, quadratic_s=9e-9)
    fit, chooser = ComputeFit(GUESS), Random(4)
    feed(fit, TRUE, chooser, 300, sigma=0.1)
    feed(fit, slower, chooser, 600, sigma=0.1)

    assert error(fit.cost, slower) < 0.2


@pytest.mark.parametrize("seed", range(10))
def test_no_coefficient_is_ever_negative(seed: int) -> None:
    """Not for times without any sense either."""
    chooser, fit = Random(seed), ComputeFit(GUESS)
    for _ in range(100):
        fit.observe([random_span(chooser)], 10 ** chooser.uniform(-6, 3))
        cost = fit.cost
        assert min(cost.fixed_s, cost.linear_s, cost.quadratic_s) >= 0
        assert all(a <= b for a, b in pairwise(cost.seconds([Span(0, n)]) for n in range(1, 9)))


def test_what_says_nothing_changes_nothing() -> None:
    """Steps without tokens and times without length, as clocks give them."""
    fit = ComputeFit(GUESS)
    fit.observe([], 1.0)
    fit.observe([Span(5, 5)], 1.0)
    fit.observe([Span(0, 5)], 0.0)
    fit.observe([Span(0, 5)], -1.0)

    assert fit.num_observed == 0
    assert error(fit.cost, GUESS) < 1e-9


def test_a_guess_of_nothing_can_be_learnt_away() -> None:
    """A start with zeros is a start."""
    fit = ComputeFit(ComputeCost(fixed_s=0, linear_s=1e-6, quadratic_s=0))
    feed(fit, TRUE, Random(5), 200, sigma=0.05)

    assert error(fit.cost, TRUE) < 0.1


# ---------------------------------------------------------------------------------------- loads

LOAD = LoadCost(latency_s=0.002, bytes_per_s=2e8)
LOAD_GUESS = LoadCost(latency_s=0.0001, bytes_per_s=1e10)


def load_error(found: LoadCost, true: LoadCost) -> float:
    """The largest relative error over loads of all sizes."""
    sizes = [(1 << 12, 0), (1 << 20, 0), (1 << 28, 0), (1 << 20, 1 << 26)]
    return max(abs(found.seconds(*size) / true.seconds(*size) - 1) for size in sizes)


def test_a_load_waits_for_latency_queue_and_bytes() -> None:
    """That is latency + (queued + bytes) / bandwidth; nothing for nothing."""
    cost = LoadCost(latency_s=0.5, bytes_per_s=100.0)

    assert cost.seconds(50) == 1.0
    assert cost.seconds(50, 100) == 2.0
    assert cost.seconds(0, 100) == 0


@pytest.mark.parametrize("seed", range(5))
def test_latency_and_bandwidth_are_told_apart(seed: int) -> None:
    """From loads of several sizes, some of them behind others, with noise and outliers."""
    fit, chooser = LoadFit(LOAD_GUESS), Random(seed)
    for _ in range(200):
        num_bytes = int(2 ** chooser.uniform(12, 28))
        queued = chooser.choice([0, 1 << 26, 1 << 27])
        seconds = LOAD.seconds(num_bytes, queued) * exp(chooser.gauss(0, 0.15))
        fit.observe(num_bytes, seconds * (20 if chooser.random() < 0.05 else 1), queued)

    assert fit.num_observed == 200
    assert load_error(fit.cost, LOAD) < 0.15


def test_loads_of_one_size_are_predicted_at_that_size() -> None:
    """All blocks are equally large: what cannot be told apart is not needed."""
    fit = LoadFit(LOAD_GUESS)
    for _ in range(50):
        fit.observe(1 << 20, LOAD.seconds(1 << 20))

    assert fit.cost.seconds(1 << 20) == pytest.approx(LOAD.seconds(1 << 20), rel=0.02)
    assert fit.cost.latency_s >= 0


def test_a_link_that_becomes_slower_is_followed() -> None:
    """Somebody else uses it from now on."""
    slower = LoadCost(latency_s=0.01, bytes_per_s=2e7)
    fit, chooser = LoadFit(LOAD), Random(1)
    for cost, count in ((LOAD, 200), (slower, 400)):
        for _ in range(count):
            num_bytes = int(2 ** chooser.uniform(12, 28))
            fit.observe(num_bytes, cost.seconds(num_bytes) * exp(chooser.gauss(0, 0.1)))

    assert load_error(fit.cost, slower) < 0.2


def test_times_that_do_not_grow_with_size_give_a_finite_bandwidth() -> None:
    """A number that can be divided by and written down."""
    fit = LoadFit(LOAD_GUESS)
    for power in range(12, 28):
        fit.observe(1 << power, 1.0 / power)

    cost = fit.cost
    assert cost.latency_s > 0
    assert 0 < cost.bytes_per_s < float("inf")
    fit.observe(0, 1.0)
    assert fit.num_observed == 16
