"""Labels in the values of a RESP server."""

from collections.abc import Iterator

import pytest

from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Labelled, Miss, MissCause, StoredObject
from kvkeep.tiers.resp import RespTier
from kvkeep.tiers.stored_value import ROOM_BYTES
from tests.dict_transport import DictTransport


@pytest.fixture
def transport() -> DictTransport:
    """A server that is a dict."""
    return DictTransport()


@pytest.fixture
def tier(transport: DictTransport) -> Iterator[RespTier]:
    """A tier on it."""
    with RespTier("redis://nowhere", transport=transport) as tier:
        yield tier


def test_the_usual_labels_fit_into_the_room_of_a_value(
    tier: RespTier, transport: DictTransport
) -> None:
    """Other labels lie in the place of those of before; a value gets longer for long ones only."""
    tier.put(key_of(1), [memoryview(content_of(key_of(1), 1000))], 1000, b"first")
    name = next(iter(transport.values))
    lengths = []
    for labels in (b"other", bytes(480), b"", bytes(489), bytes(5000), b"small"):
        assert tier.relabel(key_of(1), labels)
        lengths.append(len(transport.values[name]) - 1000)
        assert tier.labels(key_of(1)) == labels
        assert read_object(tier, key_of(1), 1000) == content_of(key_of(1), 1000)

    assert lengths == [512, 512, 512, 1024, 5120, 5120]


def test_values_of_before_have_no_labels_and_can_get_some(
    tier: RespTier, transport: DictTransport
) -> None:
    """A value without anything behind the object is the object."""
    content, key = content_of(key_of(1), 1000), key_of(1)
    transport.values[b"kvkeep:" + key.hex().encode()] = content

    assert tier.labels(key) == b""
    assert list(tier.objects()) == [StoredObject(key, 1000)]
    assert read_object(tier, key, 1000) == content
    assert tier.relabel(key, b"new")
    assert list(tier.labelled()) == [Labelled(key, 1000, b"new")]
    assert read_object(tier, key, 1000) == content


def test_a_value_is_no_object_of_its_own_length(tier: RespTier, transport: DictTransport) -> None:
    """What is behind an object is never taken for a part of it; damaged labels are no labels."""
    store_object(tier, key_of(1), 1000)
    name = next(iter(transport.values))

    found = read_object(tier, key_of(1), 1000 + ROOM_BYTES)
    assert isinstance(found, Miss)
    assert found.cause is MissCause.SHORT

    tier.relabel(key_of(1), b"tags")
    transport.values[name] = transport.values[name].replace(b"tags", b"tage")
    found = read_object(tier, key_of(1), 1000)
    assert isinstance(found, Miss)
    assert found.cause is MissCause.CORRUPT
    assert tier.labels(key_of(1)) is None
    assert list(tier.labelled()) == []


def test_labels_that_others_replace_meanwhile_are_tried_again(
    tier: RespTier, transport: DictTransport
) -> None:
    """What changed its length is looked at again; what is gone stays gone."""
    store_object(tier, key_of(1), 1000)
    store_object(tier, key_of(2), 1000)
    other = RespTier("redis://nowhere", transport=transport)

    def interfere() -> None:
        transport.before_patch = None
        other.relabel(key_of(1), bytes(2000))
        other.delete([key_of(2)])

    transport.before_patch = interfere
    wanted = {key_of(1): b"one", key_of(2): b"two", key_of(3): b"three"}
    done = tier.revise_labels(list(wanted), lambda key, _old: wanted[key])

    assert done == [True, False, False]
    assert tier.labels(key_of(1)) == b"one"
    assert len(transport.values) == 1


def test_many_labels_take_two_round_trips(tier: RespTier, transport: DictTransport) -> None:
    """However many there are, up to a thousand."""
    keys = [key_of(number) for number in range(1500)]
    for key in keys:
        store_object(tier, key, 1)
    transport.calls.clear()

    assert all(tier.revise_labels(keys, lambda _key, _old: b"tag"))

    assert transport.calls == ["ends 1000", "patch 1000", "ends 500", "patch 500"]
