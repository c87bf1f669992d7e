"""The bookkeeping of bounded tiers: sizes, writes in flight, readers, and what goes first."""

import random
from dataclasses import dataclass, field

import pytest

from kvkeep.policies import LRU, SLRU
from kvkeep.spec import StoredKey
from kvkeep.tiers.base import Presence, StoredObject
from kvkeep.tiers.catalog import Admission, Catalog, Evicted

A, B, C, D = (StoredKey(bytes([number])) for number in range(4))
NOTHING = Admission(())


def catalog_of(
    capacity_bytes: int, *keys: StoredKey, freed: list[StoredObject] | None = None
) -> Catalog:
    """A catalog with objects of ten bytes."""
    on_free = None if freed is None else freed.append
    catalog = Catalog(capacity_bytes, LRU(), on_free=on_free)
    for key in keys:
        assert catalog.restore(key, 10) == NOTHING
    return catalog


def test_an_object_is_visible_when_it_is_complete() -> None:
    """In flight it counts as used, and can be neither read nor put again nor evicted."""
    catalog = catalog_of(20)

    assert catalog.find([A]) == [Presence.ABSENT]
    assert catalog.begin(A, 15) == NOTHING
    assert catalog.find([A, B]) == [Presence.IN_FLIGHT, Presence.ABSENT]
    assert (catalog.used_bytes, catalog.in_use_bytes, len(catalog)) == (15, 15, 1)
    assert catalog.acquire(A) is None
    assert catalog.begin(A, 5) is None
    assert catalog.begin(B, 6) is None
    assert catalog.objects() == []
    assert catalog.labels(A) is None
    assert not catalog.relabel(A, b"early")

    assert catalog.commit(A)
    assert catalog.find([A]) == [Presence.PRESENT]
    assert (catalog.used_bytes, catalog.in_use_bytes) == (15, 0)
    assert catalog.objects() == [StoredObject(A, 15)]
    assert catalog.labels(A) == b""


def test_an_aborted_object_leaves_nothing() -> None:
    """Its room is free again."""
    catalog = catalog_of(20)
    catalog.begin(A, 20)

    catalog.abort(A)

    assert catalog.find([A]) == [Presence.ABSENT]
    assert (catalog.used_bytes, catalog.in_use_bytes, len(catalog)) == (0, 0, 0)
    assert catalog.begin(B, 20) == NOTHING


def test_the_least_recently_used_go_until_there_is_room() -> None:
    """As many as it takes, in order; with their labels."""
    catalog = catalog_of(30, A, B, C)
    catalog.relabel(B, b"tag")
    catalog.touch([A, D, A])

    admission = catalog.begin(D, 15)

    assert admission == Admission((Evicted(B, 10, b"tag"), Evicted(C, 10, b"")))
    assert catalog.find([A, B, C, D]) == [
        Presence.PRESENT,
        Presence.ABSENT,
        Presence.ABSENT,
        Presence.IN_FLIGHT,
    ]
    assert (catalog.used_bytes, catalog.num_evictions) == (25, 2)


def test_what_is_read_is_not_evicted() -> None:
    """An object with readers, and one in flight, stay; where the rest is not enough nothing goes."""
    catalog = catalog_of(30, A, B)
    assert catalog.acquire(A) == catalog.acquire(A) == 10
    catalog.begin(C, 10)

    assert catalog.in_use_bytes == 20
    assert catalog.begin(D, 11) is None
    assert catalog.num_evictions == 0
    assert catalog.begin(D, 10) == Admission((Evicted(B, 10, b""),))

    catalog.abort(D)
    catalog.release(A)
    assert catalog.begin(D, 20) is None
    catalog.release(A)
    assert catalog.begin(D, 20) == Admission((Evicted(A, 10, b""),))


def test_what_is_deleted_while_it_is_read_goes_with_its_last_reader() -> None:
    """Nobody finds it any more; its place is freed once, at the end."""
    freed: list[StoredObject] = []
    catalog = catalog_of(20, A, freed=freed)
    catalog.acquire(A)
    catalog.acquire(A)

    assert catalog.delete([A, A, B]) == 1
    assert catalog.find([A]) == [Presence.ABSENT]
    assert catalog.acquire(A) is None
    assert catalog.objects() == []
    assert catalog.labels(A) is None
    assert not catalog.relabel(A, b"late")
    assert catalog.begin(A, 10) is None
    catalog.release(A)
    assert (freed, catalog.used_bytes) == ([], 10)
    catalog.release(A)

    assert (freed, catalog.used_bytes, catalog.in_use_bytes) == ([StoredObject(A, 10)], 0, 0)
    assert catalog.begin(A, 10) == NOTHING


def test_what_is_deleted_in_flight_goes_when_it_would_be_complete() -> None:
    """Its writer learns of it, and frees the place itself."""
    freed: list[StoredObject] = []
    catalog = catalog_of(20, freed=freed)
    catalog.begin(A, 10)

    assert catalog.delete([A]) == 1
    assert catalog.delete([A]) == 0
    assert catalog.find([A]) == [Presence.ABSENT]
    assert not catalog.commit(A)

    assert (freed, catalog.used_bytes, catalog.in_use_bytes, len(catalog)) == ([], 0, 0, 0)


def test_a_policy_forgets_what_is_deleted() -> None:
    """An object that was read and deleted comes back as a new one, not as one that was used twice."""
    catalog = Catalog(30, SLRU())
    catalog.restore(A, 10)
    catalog.acquire(A)
    catalog.delete([A])
    catalog.release(A)
    for key in (B, A, C):
        catalog.restore(key, 10)

    assert [item.key for item in catalog.evict(30).evicted] == [B, A, C]


def test_room_can_be_made_for_others() -> None:
    """So many bytes at least, as far as nobody uses them."""
    catalog = catalog_of(40, A, B, C)
    catalog.acquire(B)

    assert catalog.evict(5).evicted == (Evicted(A, 10, b""),)
    assert catalog.evict(100).evicted == (Evicted(C, 10, b""),)
    assert catalog.evict(1).evicted == ()
    assert catalog.used_bytes == 10


def test_a_medium_says_what_an_object_takes() -> None:
    """All totals count that; sizes are what they were."""
    catalog = Catalog(40, LRU(), taken=lambda size, num_labels: 10 * -(-(size + num_labels) // 10))
    catalog.restore(A, 11)
    catalog.restore(B, 3, b"tag")

    assert catalog.used_bytes == 30
    assert catalog.objects() == [StoredObject(A, 11), StoredObject(B, 3)]
    assert catalog.acquire(A) == 11
    assert catalog.in_use_bytes == 20
    assert catalog.begin(C, 41) is None
    assert catalog.begin(C, 11) == Admission((Evicted(B, 3, b"tag"),))
    catalog.commit(C)

    assert not catalog.relabel(A, bytes(10))
    catalog.delete([C])
    assert catalog.relabel(A, bytes(10))
    assert (catalog.used_bytes, catalog.in_use_bytes) == (30, 30)
    catalog.release(A)
    assert (catalog.used_bytes, catalog.in_use_bytes) == (30, 0)
    assert catalog.relabel(A, b"")
    assert (catalog.used_bytes, catalog.in_use_bytes) == (20, 0)


def test_a_copy_takes_room_while_it_is_made() -> None:
    """The copy in flight gives its room to the labels in the moment in which they are valid."""
    catalog = Catalog(30, LRU(), taken=lambda size, num_labels: size + num_labels)
    catalog.restore(A, 10)
    catalog.acquire(A)
    assert catalog.begin(B, 10, b"labels") == NOTHING
    assert catalog.used_bytes == 26

    assert not catalog.relabel(C, b"", scratch=B)
    assert not catalog.relabel(A, bytes(30), scratch=B)
    assert catalog.find([B]) == [Presence.IN_FLIGHT]
    assert catalog.relabel(A, b"labels", scratch=B)

    assert catalog.labels(A) == b"labels"
    assert catalog.find([B]) == [Presence.ABSENT]
    assert (catalog.used_bytes, catalog.in_use_bytes) == (16, 16)


def test_what_is_held_and_read_goes_with_its_last_reader() -> None:
    """A delete ends a hold; who reads goes on, and then the place is free."""
    freed: list[StoredObject] = []
    catalog = catalog_of(30, A, B, freed=freed)
    assert catalog.hold([A, B, C]) == [True, True, False]
    catalog.acquire(A)
    assert catalog.in_use_bytes == 20

    assert catalog.delete([A, B]) == 2

    assert freed == [StoredObject(B, 10)]
    assert catalog.hold([A]) == [False]
    catalog.let_go([A])
    assert catalog.in_use_bytes == 10
    catalog.release(A)
    assert freed == [StoredObject(B, 10), StoredObject(A, 10)]
    assert (catalog.used_bytes, catalog.in_use_bytes) == (0, 0)


@dataclass
class Model:
    """The same by the plainest means: dicts, and a list in order of use."""

    capacity: int
    in_flight: dict[StoredKey, int] = field(default_factory=dict)
    complete: dict[StoredKey, int] = field(default_factory=dict)
    order: list[StoredKey] = field(default_factory=list)
    held: set[StoredKey] = field(default_factory=set)

    def in_use(self) -> int:
        return sum(self.in_flight.values()) + sum(self.complete[key] for key in self.held)

    def used(self) -> int:
        return sum(self.in_flight.values()) + sum(self.complete.values())

    def begin(self, key: StoredKey, num_bytes: int) -> list[StoredKey] | None:
        if key in self.in_flight or key in self.complete:
            return None
        if num_bytes > self.capacity - self.in_use():
            return None
        gone = []
        while self.used() + num_bytes > self.capacity:
            gone.append(self.order.pop(0))
            del self.complete[gone[-1]]
        self.in_flight[key] = num_bytes
        return gone

    def use(self, key: StoredKey) -> None:
        if key in self.complete and key not in self.held:
            self.order.remove(key)
            self.order.append(key)

    def hold(self, key: StoredKey) -> bool:
        if key in self.complete and key not in self.held:
            self.held.add(key)
            self.order.remove(key)
        return key in self.held

    def let_go(self, key: StoredKey) -> None:
        if key in self.held:
            self.held.remove(key)
            self.order.append(key)

    def delete(self, key: StoredKey) -> None:
        self.let_go(key)
        del self.complete[key]
        self.order.remove(key)


@pytest.mark.parametrize("seed", range(20))
def test_it_does_what_the_plainest_model_does(seed: int) -> None:
    """Random calls, each compared: results, totals, and who is there."""
    chooser = random.Random(seed)
    keys = [StoredKey(bytes([number])) for number in range(12)]
    catalog, model = Catalog(100, LRU()), Model(100)
    for _ in range(400):
        key = chooser.choice(keys)
        match chooser.randrange(8):
            case 0 | 1:
                num_bytes = chooser.randrange(1, 60)
                gone, admission = model.begin(key, num_bytes), catalog.begin(key, num_bytes)
                assert (gone is None) == (admission is None)
                assert admission is None or [item.key for item in admission.evicted] == gone
            case 2 if key in model.in_flight:
                assert catalog.commit(key)
                model.complete[key] = model.in_flight.pop(key)
                model.order.append(key)
            case 3 if key in model.in_flight:
                catalog.abort(key)
                del model.in_flight[key]
            case 4 if key in model.complete:
                assert catalog.acquire(key) == model.complete[key]
                catalog.release(key)
                model.use(key)
            case 5 if key in model.complete:
                assert catalog.delete([key]) == 1
                model.delete(key)
            case 6:
                assert catalog.hold([key]) == [model.hold(key)]
            case 7:
                catalog.let_go([key])
                model.let_go(key)
        assert catalog.used_bytes == model.used() <= 100
        assert catalog.in_use_bytes == model.in_use()
        assert {item.key for item in catalog.objects()} == model.complete.keys()
