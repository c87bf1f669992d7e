"""Faults happen when they are told to, the same ones again from the same seed, and no others."""

from threading import Thread
from time import monotonic, sleep

import pytest

from kvkeep.errors import ConfigError
from kvkeep.spec import StoredKey
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Got, Miss, MissCause, Presence, PutOutcome
from kvkeep.tiers.host import HostTier

SIZE = 1000


def faulty(*faults: Fault, seed: int = 0, num_objects: int = 0) -> FaultyTier:
    """A tier that has objects 0, 1, ... from a time without faults."""
    tier = FaultyTier(HostTier(1 << 20), [], seed=seed)
    for number in range(num_objects):
        assert store_object(tier, key_of(number), SIZE) is PutOutcome.STORED
    tier.replace_faults(faults)
    return tier


def num_bits_off(found: bytes | Miss, key: StoredKey) -> int:
    """In how many bits a result differs from the object."""
    assert not isinstance(found, Miss)
    right = content_of(key, SIZE)
    return sum((a ^ b).bit_count() for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("kind", ["fail", "truncate", "vanish"])
def test_a_get_that_fails_says_so(kind: str) -> None:
    """Each cause is its own; the object survives unless it vanished."""
    tier = faulty(Fault(kind, "get", calls=[1]), num_objects=3)
    causes = {
        "fail": MissCause.UNAVAILABLE,
        "truncate": MissCause.SHORT,
        "vanish": MissCause.ABSENT,
    }

    results = [read_object(tier, key_of(number), SIZE) for number in range(3)]

    assert results[0] == content_of(key_of(0), SIZE)
    assert isinstance(results[1], Miss)
    assert results[1].cause is causes[kind]
    assert results[2] == content_of(key_of(2), SIZE)
    assert tier.num_happened == {f"get {kind}": 1}
    is_there = tier.find([key_of(1)]) == [Presence.PRESENT]
    assert is_there == (kind != "vanish")


@pytest.mark.parametrize("operation", ["get", "put"])
def test_a_flip_changes_one_bit_and_says_nothing(operation: str) -> None:
    """A flip on the way out is gone the next time, one on the way in stays."""
    tier = faulty(Fault("flip", operation, calls=range(100)))
    store_object(tier, key_of(1), SIZE)

    first = read_object(tier, key_of(1), SIZE)
    tier.replace_faults([])
    second = read_object(tier, key_of(1), SIZE)

    assert num_bits_off(first, key_of(1)) == 1
    assert num_bits_off(second, key_of(1)) == (operation == "put")


@pytest.mark.parametrize("operation", ["get", "put"])
def test_a_swap_gives_the_bytes_of_another_object(operation: str) -> None:
    """Only of one that is as long; where there is none, all is right."""
    tier = faulty(Fault("swap", operation, calls=range(100)))
    store_object(tier, key_of(0), SIZE)
    store_object(tier, key_of(9), SIZE + 1)
    assert read_object(tier, key_of(0), SIZE) == content_of(key_of(0), SIZE)
    store_object(tier, key_of(1), SIZE)

    assert read_object(tier, key_of(1), SIZE) == content_of(key_of(0), SIZE)
    if operation == "get":
        assert read_object(tier, key_of(0), SIZE) == content_of(key_of(1), SIZE)


def test_a_put_can_store_too_little_or_nothing() -> None:
    """Both say "stored"; the medium has a byte less, or does not have it."""
    tier = faulty(Fault("truncate", "put", calls=[0]), Fault("vanish", "put", calls=[1]))

    assert store_object(tier, key_of(0), SIZE) is PutOutcome.STORED
    assert store_object(tier, key_of(1), SIZE) is PutOutcome.STORED

    assert tier.find([key_of(0), key_of(1)]) == [Presence.PRESENT, Presence.ABSENT]
    short = read_object(tier, key_of(0), SIZE)
    assert isinstance(short, Miss)
    assert short.cause is MissCause.SHORT
    assert read_object(tier, key_of(0), SIZE - 1) == content_of(key_of(0), SIZE)[:-1]


def test_finds_puts_and_deletes_fail() -> None:
    """A failed find says absent, a failed delete deletes nothing."""
    tier = faulty(
        Fault("fail", "find", calls=[0]),
        Fault("fail", "put", calls=[1]),
        Fault("fail", "delete", calls=[0]),
        num_objects=1,
    )

    assert tier.find([key_of(0)]) == [Presence.ABSENT]
    assert tier.find([key_of(0)]) == [Presence.PRESENT]
    assert store_object(tier, key_of(5), SIZE) is PutOutcome.FAILED
    assert tier.delete([key_of(0)]) == 0
    assert tier.delete([key_of(0)]) == 1


def test_an_object_can_vanish_between_find_and_get() -> None:
    """The find was right when it was made."""
    tier = faulty(Fault("vanish", "find", calls=[0]), num_objects=2)

    assert tier.find([key_of(0)]) == [Presence.PRESENT]

    assert isinstance(read_object(tier, key_of(0), SIZE), Miss)
    assert read_object(tier, key_of(1), SIZE) == content_of(key_of(1), SIZE)


def test_a_delay_comes_before_the_answer() -> None:
    """One for a call, however many of its keys are slow."""
    slept: list[float] = []
    tier = FaultyTier(
        HostTier(1 << 20),
        [Fault("delay", "find", probability=1, delay_s=0.25), Fault("delay", "get", calls=[0])],
        sleep=slept.append,
    )

    tier.find([key_of(0), key_of(1)])
    read_object(tier, key_of(0), SIZE)
    read_object(tier, key_of(0), SIZE)

    assert slept == [0.25, 0.05]


@pytest.mark.parametrize("lets_go", ["release", "close"])
def test_a_hanging_call_waits_for_its_release(lets_go: str) -> None:
    """It goes on where it stood; later ones do not hang, until they are held again."""
    tier = faulty(Fault("hang", "get", calls=range(100)), num_objects=1)
    found: list[bytes | Miss] = []
    thread = Thread(target=lambda: found.append(read_object(tier, key_of(0), SIZE)))
    thread.start()
    until = monotonic() + 30
    while not tier.num_hanging and monotonic() < until:
        sleep(0.001)
    assert (tier.num_hanging, found) == (1, [])

    getattr(tier, lets_go)()
    thread.join(30)

    assert tier.num_hanging == 0
    assert len(found) == 1
    if lets_go == "release":
        assert found == [content_of(key_of(0), SIZE)]
        assert read_object(tier, key_of(0), SIZE) == content_of(key_of(0), SIZE)
        tier.hang_again()
        thread = Thread(target=lambda: found.append(read_object(tier, key_of(0), SIZE)))
        thread.start()
        while not tier.num_hanging and monotonic() < until:
            sleep(0.001)
        assert tier.num_hanging == 1
        tier.release()
        thread.join(30)


def outcomes(seed: int, numbers: list[int]) -> dict[int, bool]:
    """Which of the objects were got right, each asked for twice, in this order."""
    tier = faulty(Fault("fail", "get", probability=0.3), seed=seed, num_objects=40)
    right: dict[int, bool] = {}
    for number in numbers * 2:
        found = read_object(tier, key_of(number), SIZE)
        right[number] = right.get(number, True) and not isinstance(found, Miss)
    return right


def test_a_seed_makes_the_same_faults_in_any_order() -> None:
    """What happens to a key does not depend on which others were asked for before it."""
    forwards, backwards = outcomes(1, list(range(40))), outcomes(1, list(range(39, -1, -1)))

    assert forwards == backwards
    assert set(forwards.values()) == {True, False}
    assert forwards != outcomes(2, list(range(40)))


def test_probabilities_are_kept() -> None:
    """Of many calls about that share fails; of several faults the first that is drawn happens."""
    tier = faulty(
        Fault("fail", "get", probability=0.25),
        Fault("truncate", "get", probability=1),
        num_objects=10,
    )

    for _ in range(100):
        for number in range(10):
            tier.get(key_of(number), [memoryview(bytearray(SIZE))])

    happened = tier.num_happened
    assert happened["get fail"] + happened["get truncate"] == 1000
    assert 200 <= happened["get fail"] <= 300


def test_faults_can_be_taken_away() -> None:
    """A healed tier is the tier inside."""
    tier = faulty(Fault("fail", "get", probability=1), num_objects=1)
    assert isinstance(read_object(tier, key_of(0), SIZE), Miss)

    tier.replace_faults([])

    assert tier.get(key_of(0), [memoryview(bytearray(SIZE))]) == Got(SIZE)


@pytest.mark.parametrize(
    ("kind", "operation", "options", "message"),
    [
        ("filp", "get", {}, "kind='filp'.*did you mean flip"),
        ("flip", "find", {}, "operation='find'.*get, put"),
        ("fail", "gte", {}, "operation='gte'.*get"),
        ("fail", "get", {"probability": 1.5}, "probability=1.5"),
        ("delay", "get", {"delay_s": -1.0}, "delay_s=-1.0"),
        ("delay", "get", {"delay_s": float("nan")}, "delay_s=nan"),
    ],
)
def test_a_fault_that_cannot_be_is_a_setting_error(
    kind: str, operation: str, options: dict[str, float], message: str
) -> None:
    """The message names the field, the value and what to write instead."""
    with pytest.raises(ConfigError, match=message):
        Fault(kind, operation, **options)  # type: ignore[arg-type]  # probabilities and times are floats
