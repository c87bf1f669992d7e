import random
from threading import Event, Thread
from time import monotonic

import pytest

from kvkeep.tiers.base import MissCause
from kvkeep.tiers.deadlines import BoundedCalls, CallError, Deadline, Turns


class Clock:
    """Seconds that pass when a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_deadline_counts_down_and_then_raises() -> None:
    """What is left is more than 0, or there is a fault that says late and how long it was."""
    clock = Clock()
    deadline = Deadline(2.0, clock)
    clock.now_s = 1.5
    assert deadline.left_s() == 0.5

    clock.now_s = 2.0

    assert deadline.remaining_s() == 0.0
    with pytest.raises(CallError, match="within 2 s") as caught:
        deadline.left_s()
    assert caught.value.cause is MissCause.LATE


def test_a_part_of_a_call_ends_no_later_than_the_call() -> None:
    """`at_most` shortens and never prolongs."""
    clock = Clock()
    deadline = Deadline(2.0, clock)

    assert deadline.at_most(0.5).left_s() == 0.5
    assert deadline.at_most(5.0).left_s() == 2.0


def test_time_that_the_caller_spent_is_given_back() -> None:
    """The maker of the bytes is not the medium."""
    clock = Clock()
    deadline = Deadline(1.0, clock)
    clock.now_s = 3.0

    deadline.prolong(2.5)

    assert deadline.left_s() == 0.5


def test_who_waits_comes_before_who_comes_back() -> None:
    """A turn that is given back is the waiting one's at once, in the order in which they came."""
    turns, order, may_go = Turns(1), list[str](), Event()
    assert turns.take(30)

    def wait(name: str) -> None:
        assert turns.take(30)
        order.append(name)
        assert may_go.wait(30)
        turns.give_back()

    threads = []
    for at, name in enumerate(("first", "second")):
        threads.append(Thread(target=wait, args=(name,)))
        threads[-1].start()
        while len(turns._waiting) <= at:
            pass
    turns.give_back()

    assert not turns.take(0.01)
    may_go.set()
    assert turns.take(30)
    for thread in threads:
        thread.join()
    assert order == ["first", "second"]


def test_no_more_calls_run_than_there_are_turns() -> None:
    """Eight threads with three turns, some of which give up waiting: nothing is lost or made."""
    turns, running, most = Turns(3), list[int](), list[int]()

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        for _ in range(400):
            if turns.take(chooser.choice([0.0, 0.0001, 30.0])):
                running.append(seed)
                most.append(len(running))
                running.remove(seed)
                turns.give_back()

    threads = [Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(most) <= 3
    assert [turns.take(0.0) for _ in range(4)] == [True, True, True, False]


def test_a_call_that_is_given_up_keeps_its_thread_until_it_ends() -> None:
    """With one thread the second call waits in vain, the third one runs after the first has ended."""
    calls, is_over = BoundedCalls(1, name="test"), Event()
    try:
        with pytest.raises(CallError) as first:
            calls.run(is_over.wait, Deadline(0.05))
        with pytest.raises(CallError) as second:
            calls.run(lambda: 1, Deadline(0.05))
        is_over.set()

        assert calls.run(lambda: 2, Deadline(30)) == 2
        assert first.value.cause is second.value.cause is MissCause.LATE
        assert "busy" in str(second.value)
    finally:
        is_over.set()
        calls.close()


def test_what_a_call_raises_is_raised() -> None:
    """Also where it is a TimeoutError of its own, which is not ours."""
    calls = BoundedCalls(2, name="test")
    try:
        for error in (LookupError("x"), TimeoutError("y"), CallError(MissCause.LATE, "z")):

            def fail(error: Exception = error) -> None:
                raise error

            with pytest.raises(type(error), match=str(error)):
                calls.run(fail, Deadline(30))
    finally:
        calls.close()


def test_closed_calls_are_unavailable_at_once() -> None:
    """Nobody waits for what was closed."""
    calls, start = BoundedCalls(1, name="test"), monotonic()
    calls.close()
    calls.close()

    with pytest.raises(CallError, match="closed") as caught:
        calls.run(lambda: 1, Deadline(300))

    assert caught.value.cause is MissCause.UNAVAILABLE
    assert monotonic() - start < 60
