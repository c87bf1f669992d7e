"""Questions about many blocks in bits: no bit has many blocks, and what changes between two is no matter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.cache import PinId, Query
from kvkeep.cache.inspection import Inspection
from kvkeep.cache.slices import Bits, Sliced, to_end
from kvkeep.config import CacheOptions
from kvkeep.spec import BlockKey, StoredKey
from kvkeep.tiers.base import Miss, MissCause
from tests.lifetime_books import Clock
from tests.lifetime_cache import LifetimeCache, disk

NUM_TOKENS = 4 * 150
_MOST_AT_ONCE = 64


@pytest.fixture
def checked(tmp_path: Path) -> Iterator[LifetimeCache]:
    """Two tenants with 150 tagged blocks each, on the device and on a disk."""
    cache = LifetimeCache(Clock(), tiers=[disk(tmp_path)], room=512)
    for salt in ("a", "b"):
        cache.serve(range(NUM_TOKENS), CacheOptions(tags=["t"], salt=salt))
    cache.cache.offload()
    for salt in ("a", "b"):
        cache.serve([*range(NUM_TOKENS), 0], CacheOptions(tags=["t"], salt=salt))
    cache.settle()
    yield cache
    cache.cache.close()


def walked(inspection: Inspection, query: Query) -> set[BlockKey]:
    """All that a walk finds, which has it once."""
    found = [key for keys in inspection.walk(query) for key in keys]
    assert len(set(found)) == len(found)
    return set(found)


def test_a_walk_finds_what_is_meant_in_parts(checked: LifetimeCache) -> None:
    """The blocks of a tenant and nobody else's, few at a time."""
    inspection = checked.admin.inspection
    own = set(checked.chain(range(NUM_TOKENS), "a").keys)
    query = checked.query(salts=("a",))

    assert walked(inspection, query) == own
    assert max(map(len, inspection.walk(query))) <= _MOST_AT_ONCE
    assert len(walked(inspection, checked.query(tags=("t",)))) == 2 * len(own)
    wanted = min(own)
    assert [one for one in inspection.walk(query, wanted.__eq__) if one] == [[wanted]]


def test_what_goes_during_a_walk_is_left_out(checked: LifetimeCache) -> None:
    """A purge between two bits is heeded by those that come."""
    walk = checked.admin.inspection.walk(checked.query(tags=("t",)))
    first = next(walk)

    checked.admin.purges.purge(checked.query(tags=("t",)))

    assert first
    assert not [key for keys in walk for key in keys]


def test_what_is_labelled_anew_during_a_walk_is_found_once(checked: LifetimeCache) -> None:
    """Blocks that get other labels between two bits are neither lost nor told twice."""
    walk = checked.admin.inspection.walk(checked.query(salts=("a",)))
    first = next(walk)

    checked.serve(range(NUM_TOKENS), CacheOptions(tags=["u"], session="s", salt="a"))

    found = [*first, *(key for keys in walk for key in keys)]
    assert len(found) == len(set(found)) == NUM_TOKENS // 4


def test_blocks_are_held_in_places_with_the_bytes_there(checked: LifetimeCache) -> None:
    """What a block takes in each place, of which the report has the sum."""
    inspection = checked.admin.inspection
    keys = checked.chain(range(8), "a").keys

    (held, _), (report, _) = inspection.held(keys), inspection.reports(keys)

    assert tuple(held.place_to_bytes) == report.places == ("device", "disk")
    assert all(held.place_to_bytes.values())
    assert sum(held.place_to_bytes.values()) == report.num_bytes


def test_a_tenants_check_counts_its_own_blocks_alone(checked: LifetimeCache) -> None:
    """Those on the device, and with tiers its objects there."""
    inspection, query = checked.admin.inspection, checked.query(salts=("a",))
    num_own = NUM_TOKENS // 4

    here = to_end(inspection.verify(query))
    everywhere = to_end(inspection.verify(query, tiers=True))

    assert here.ok
    assert everywhere.ok
    assert (here.blocks_checked, everywhere.blocks_checked) == (num_own, 2 * num_own)
    assert to_end(inspection.audit()).blocks_checked == 2 * num_own


def test_a_tenants_check_finds_what_is_wrong_with_its_own(
    checked: LifetimeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged object is a problem for its tenant, and not for another."""
    key = checked.chain(range(4), "a").keys[0]

    def why_wrong(stored: StoredKey, _: memoryview) -> Miss | None:
        return Miss(MissCause.CORRUPT, "spoilt") if stored[:-1] == key else None

    monkeypatch.setattr("kvkeep.tiers.audit.why_wrong", why_wrong)
    of_a = to_end(checked.admin.inspection.verify(checked.query(salts=("a",)), tiers=True))
    of_b = to_end(checked.admin.inspection.verify(checked.query(salts=("b",)), tiers=True))

    assert [key.hex() in problem and "spoilt" in problem for problem in of_a.problems] == [True]
    assert of_b.ok
    assert not checked.admin.verify(tiers=True).ok


def test_work_stops_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one bit each time, and not much more; the result is there at the end."""
    times = iter(range(100))
    monkeypatch.setattr("kvkeep.cache.slices.thread_time", lambda: next(times))
    done: list[int] = []

    def count() -> Bits[int]:
        for number in range(3):
            done.append(number)
            yield
        return len(done)

    work = Sliced(count())
    seen = []
    while not work.go_on():
        seen.append(len(done))

    assert seen == [1, 2, 3]
    assert work.result == 3
    assert work.go_on()


def test_an_error_of_the_work_is_passed_on() -> None:
    """Whoever has it done gets to know."""

    def fail() -> Bits[None]:
        yield
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        to_end(fail())


def test_sessions_and_pins_that_end_during_their_list_are_left_out(checked: LifetimeCache) -> None:
    """Each is a bit of its own, told as it is when its turn comes."""
    admin, prompts = checked.admin, [list(range(8 * number, 8 * number + 8)) for number in range(3)]
    for number, prompt in enumerate(prompts):
        checked.serve(prompt, CacheOptions(session=f"s{number}"))
        admin.pin(PinId(f"p{number}"), checked.chain(prompt))
    sessions, pins = admin.inspection.sessions(), admin.inspection.pins()
    next(sessions)
    next(pins)

    admin.close_session(checked.session_id("s2"))
    admin.unpin(PinId("p2"))

    assert [one.name for one in to_end(sessions)] == ["s0", "s1"]
    assert [(one.name, one.num_blocks) for one in to_end(pins)] == [("p0", 2), ("p1", 2)]
