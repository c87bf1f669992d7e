"""Labels: stored and read again, merged, bounded."""

from dataclasses import replace
from math import inf, nan

import msgspec
import pytest

from kvkeep.cache.lifetimes import (
    ContextId,
    Labels,
    PinId,
    SessionId,
    decode_labels,
    encode_labels,
    merge_labels,
)
from kvkeep.spec import BlockKey

ROOT = BlockKey(bytes(range(32)))
LABELS = Labels(
    namespace=ROOT,
    sessions=frozenset({"b", "a"}),
    tags=frozenset({"doc:77", "Ünï"}),
    expires_at=1234.5,
    created_at=1000.25,
    priority=80,
    pins=frozenset({PinId("manual")}),
    contexts=frozenset({ContextId("a", "work")}),
)


def test_labels_come_back_as_they_were() -> None:
    """Every field survives, the infinite end too; equal labels are equal bytes."""
    for labels in (LABELS, replace(LABELS, expires_at=inf, is_shared=True)):
        assert decode_labels(encode_labels(labels)) == labels
    other = replace(LABELS, sessions=frozenset(["a", "b"]), tags=frozenset(["Ünï", "doc:77"]))
    assert encode_labels(other) == encode_labels(LABELS)


def fields() -> list[object]:
    """The stored form as plain values."""
    plain = msgspec.msgpack.decode(encode_labels(LABELS))
    assert isinstance(plain, list)
    return plain


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, 2),
        (0, "1"),
        (1, b"short"),
        (2, "a"),
        (3, None),
        (5, nan),
        (6, nan),
        (7, 1.5),
        (9, [["one"]]),
    ],
)
def test_what_cannot_be_read_is_none(at: int, value: object) -> None:
    """Another version, a wrong type, a time that is none: no labels, and no error."""
    plain = fields()
    plain[at] = value

    assert decode_labels(msgspec.msgpack.encode(plain)) is None


@pytest.mark.parametrize("encoded", [b"", b"\x00", b"\xff" * 40, encode_labels(LABELS)[:-3]])
def test_bytes_that_are_no_labels_are_none(encoded: bytes) -> None:
    """Nothing, garbage, and what was cut off."""
    assert decode_labels(encoded) is None


def test_a_later_version_may_add_fields_at_the_end() -> None:
    """Fields that this version does not know are left alone."""
    assert decode_labels(msgspec.msgpack.encode([*fields(), "more"])) == LABELS


def test_merging_keeps_all_users_and_the_longest_life() -> None:
    """The order makes no difference, and a label merged with itself is itself."""
    other = Labels(
        namespace=ROOT, is_shared=True, tags=frozenset({"x"}), created_at=900.0, priority=10
    )

    merged = merge_labels(LABELS, other)

    assert merged == merge_labels(other, LABELS)
    assert merged.sessions == {"a", "b"}
    assert merged.is_shared
    assert merged.tags == {"doc:77", "Ünï", "x"}
    assert (merged.expires_at, merged.created_at, merged.priority) == (inf, 900.0, 80)
    assert merge_labels(merged, merged) == merged


def test_a_block_of_very_many_sessions_is_everybodys() -> None:
    """Labels do not grow without end; who shares with many takes nothing along when it ends."""
    many = replace(LABELS, sessions=frozenset(map(str, range(65))), pins=frozenset())

    bounded = merge_labels(many, many)

    assert bounded.sessions == frozenset()
    assert bounded.is_shared
    assert not bounded.is_owned_by("1")


def test_what_is_pinned_does_not_end_and_belongs_to_no_session() -> None:
    """Only without its pins a block goes with its session, or at its time."""
    alone = replace(LABELS, sessions=frozenset({"a"}))

    assert alone.ends_at == inf
    assert not alone.is_owned_by("a")
    free = alone.without_pin(PinId("manual"))
    assert free.ends_at == 1234.5
    assert free.is_owned_by("a")
    assert not free.is_owned_by("b")


def test_sessions_that_ended_are_not_brought_back() -> None:
    """Labels read from a tier lose what has ended meanwhile, contexts included."""
    kept = LABELS.kept(lambda one: one != SessionId(ROOT, "a"), lambda _: False)

    assert kept.sessions == {"b"}
    assert kept.contexts == frozenset()
    assert kept.pins == frozenset()
