import logging
from threading import Barrier, Thread

import pytest

from kvkeep.errors import ConfigError
from kvkeep.tiers.breaker import Breaker, BreakerRules, BreakerState


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    """Pauses of 1 to 5 s."""
    return Breaker("store", BreakerRules(first_pause_s=1.0, max_pause_s=5.0), clock=clock)


def call(breaker: Breaker, *, works: bool, reason: str = "refused") -> bool:
    """Make a call, if it is admitted, and report what became of it; whether it was admitted."""
    permit = breaker.admit()
    if permit is None:
        return False
    if works:
        permit.succeed()
    else:
        permit.fail(reason)
    return True


def state_of(breaker: Breaker) -> BreakerState:
    """Its state now."""
    return breaker.stats().state


def opened(breaker: Breaker) -> Breaker:
    """The breaker after three failures."""
    for _ in range(3):
        assert call(breaker, works=False)
    assert state_of(breaker) is BreakerState.OPEN
    return breaker


def test_it_opens_after_failures_in_a_row(breaker: Breaker) -> None:
    """Two failures are bad luck, a success makes them forgotten, three in a row open it."""
    for works in (False, False, True, False, False):
        assert call(breaker, works=works)
    assert state_of(breaker) is BreakerState.CLOSED

    call(breaker, works=False)

    assert state_of(breaker) is BreakerState.OPEN
    assert breaker.is_resting
    assert breaker.admit() is None


def test_it_opens_when_half_of_the_calls_fail(breaker: Breaker) -> None:
    """Never three in a row, and still half of twenty calls."""
    for at in range(19):
        assert call(breaker, works=not at % 2)
    assert state_of(breaker) is BreakerState.CLOSED

    call(breaker, works=False)

    assert state_of(breaker) is BreakerState.OPEN


def test_a_few_failures_among_many_calls_leave_it_closed(breaker: Breaker) -> None:
    """One call in three may fail for ever."""
    for at in range(300):
        assert call(breaker, works=bool(at % 3))

    assert state_of(breaker) is BreakerState.CLOSED


def test_after_the_pause_one_probe_is_admitted(breaker: Breaker, clock: Clock) -> None:
    """While the probe is under way everybody else is refused; its success closes the breaker."""
    opened(breaker)
    clock.now_s += 0.99
    assert breaker.admit() is None
    clock.now_s += 0.02

    probe = breaker.admit()
    assert probe is not None
    assert state_of(breaker) is BreakerState.HALF_OPEN
    assert breaker.admit() is None
    probe.succeed()

    assert state_of(breaker) is BreakerState.CLOSED
    assert breaker.admit() is not None
    assert breaker.stats().num_refused == 2


def test_pauses_grow_while_probes_fail_and_start_anew_after_a_success(
    breaker: Breaker, clock: Clock
) -> None:
    """1, 2, 4, then 5 seconds, which is the most; after it was closed it is 1 again."""
    opened(breaker)
    for pause_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        clock.now_s += pause_s - 0.01
        assert not call(breaker, works=False)
        clock.now_s += 0.02
        assert call(breaker, works=False)
    clock.now_s += 5.01
    assert call(breaker, works=True)

    opened(breaker)
    clock.now_s += 1.01

    assert call(breaker, works=True)


def test_a_probe_that_is_lost_is_replaced(breaker: Breaker, clock: Clock) -> None:
    """A caller that never reports keeps nobody out for longer than a pause."""
    opened(breaker)
    clock.now_s += 1.01
    lost = breaker.admit()
    assert lost is not None
    assert breaker.admit() is None
    clock.now_s += 1.01

    assert call(breaker, works=True)
    lost.fail("late")

    assert state_of(breaker) is BreakerState.CLOSED


def test_an_abandoned_probe_lets_the_next_call_be_it(breaker: Breaker, clock: Clock) -> None:
    """A call that was not made tells nothing, and costs no further pause."""
    opened(breaker)
    clock.now_s += 1.01
    probe = breaker.admit()
    assert probe is not None

    probe.abandon()

    assert call(breaker, works=True)
    assert state_of(breaker) is BreakerState.CLOSED


def test_calls_from_before_it_opened_say_nothing(breaker: Breaker, clock: Clock) -> None:
    """Ten calls wait when it opens: their late answers neither close it nor make the pause longer."""
    waiting = [breaker.admit() for _ in range(10)]
    opened(breaker)
    clock.now_s += 0.5

    for at, permit in enumerate(waiting):
        assert permit is not None
        if at % 2:
            permit.succeed()
        else:
            permit.fail("late")

    assert state_of(breaker) is BreakerState.OPEN
    clock.now_s += 0.51
    assert call(breaker, works=True)
    assert state_of(breaker) is BreakerState.CLOSED
    assert (breaker.stats().num_failures, breaker.stats().num_openings) == (8, 1)


def test_it_can_be_opened_at_once(breaker: Breaker) -> None:
    """`trip` is for who knows already; doing it twice is one opening."""
    breaker.trip("connection refused")
    breaker.trip("connection refused")

    stats = breaker.stats()
    assert (stats.state, stats.reason) == (BreakerState.OPEN, "connection refused")
    assert stats.num_openings == 1
    assert breaker.admit() is None


def test_an_outage_is_one_warning_and_one_line_at_its_end(
    breaker: Breaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """However many probes fail; both name the store, and the warning its reason."""
    caplog.set_level(logging.INFO, "kvkeep")
    opened(breaker)
    for _ in range(5):
        clock.now_s += 6
        call(breaker, works=False)
    clock.now_s += 6
    call(breaker, works=True)

    levels = [record.levelno for record in caplog.records]

    assert levels == [logging.WARNING, logging.INFO]
    assert "store" in caplog.messages[0]
    assert "refused" in caplog.messages[0]
    assert "store" in caplog.messages[1]


def test_threads_get_one_probe_among_them(clock: Clock) -> None:
    """All that ask at the same instant after a pause: one is admitted."""
    for _ in range(50):
        breaker = Breaker("store", clock=clock)
        breaker.trip("gone")
        clock.now_s += 1
        start, admitted = Barrier(4), list[object]()

        def ask(
            breaker: Breaker = breaker, start: Barrier = start, to: list[object] = admitted
        ) -> None:
            start.wait()
            permit = breaker.admit()
            if permit is not None:
                to.append(permit)

        threads = [Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(admitted) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_failures", 0), ("window", 0), ("max_share", 0.0), ("max_share", 1.1), ("growth", 0.5),
     ("first_pause_s", 0.0), ("first_pause_s", 31.0)],
)  # fmt: skip
def test_rules_that_cannot_be_are_refused(field: str, value: float) -> None:
    """The message names the field and what to do."""
    with pytest.raises(ConfigError, match=f"{field}=.*give"):
        BreakerRules(**{field: value})  # type: ignore[arg-type]
