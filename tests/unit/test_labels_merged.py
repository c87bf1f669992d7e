"""What labels become that several machines write."""

from dataclasses import replace

from kvkeep.cache.lifetimes import Labels
from kvkeep.cache.lifetimes.labels import ContextId, PinId
from kvkeep.cache.lifetimes.merging import is_stricter, left_of, revised_labels
from tests.lifetime_books import root

BASE = Labels(namespace=root(), sessions=frozenset("ab"), tags=frozenset("t"), expires_at=100.0)


def names(*words: str) -> frozenset[str]:
    """A set of names."""
    return frozenset(words)


def test_what_either_side_adds_is_there() -> None:
    """Sessions, tags, pins and contexts of both."""
    ours = replace(BASE, sessions=names("a", "b", "c"), pins=frozenset({PinId("p")}))
    contexts = frozenset({ContextId("a", "x")})
    theirs = replace(BASE, tags=names("t", "u"), contexts=contexts)

    merged = revised_labels(theirs, ours, BASE, 0.0)

    assert merged.sessions == {"a", "b", "c"}
    assert merged.tags == {"t", "u"}
    assert merged.pins == {"p"}
    assert merged.contexts == contexts


def test_what_either_side_takes_away_is_gone() -> None:
    """Also when each has ended one of two sessions: then nobody uses the block."""
    ours, theirs = BASE.without_session("a"), BASE.without_session("b")

    assert revised_labels(theirs, BASE, BASE, 0.0).sessions == {"a"}
    assert revised_labels(BASE, ours, BASE, 0.0).sessions == {"b"}
    assert revised_labels(theirs, ours, BASE, 0.0).is_orphaned


def test_without_a_base_nothing_is_taken_away() -> None:
    """But what we know to have ended is: `left_of` says it of what we last knew elsewhere."""
    ours, theirs = BASE.without_session("a"), replace(BASE, sessions=names("a", "z"))

    assert revised_labels(theirs, ours, None, 0.0).sessions == {"a", "b", "z"}
    assert revised_labels(theirs, ours, left_of(BASE, ours), 0.0).sessions == {"b", "z"}


def test_the_longer_life_and_the_higher_priority_hold() -> None:
    """Whoever wrote them; the block is as old as the older says."""
    theirs = replace(BASE, expires_at=50.0, priority=90, created_at=5.0)
    ours = replace(BASE, expires_at=200.0, priority=10, created_at=3.0, is_shared=True)
    for base in (None, BASE):
        merged = revised_labels(theirs, ours, base, 0.0)
        assert (merged.expires_at, merged.priority, merged.created_at) == (200.0, 90, 3.0)
        assert merged.is_shared


def test_a_life_that_is_over_is_not_gone_on_with() -> None:
    """Nor are labels of another tenant, or none."""
    ours = replace(BASE, sessions=names("c"), tags=names(), expires_at=300.0)

    assert revised_labels(BASE, ours, None, 100.0) is ours
    assert revised_labels(replace(BASE, namespace=root("x")), ours, None, 0.0) is ours
    assert revised_labels(None, ours, BASE, 0.0) is ours
    pinned = replace(BASE, pins=frozenset({PinId("p")}))
    assert revised_labels(pinned, ours, None, 100.0).sessions == {"a", "b", "c"}


def test_stricter_is_what_would_let_a_block_live_too_long() -> None:
    """More tags, one user less, no pin any more, a shorter life; not the other way about."""
    pinned = replace(BASE, pins=frozenset({PinId("p")}))
    shared = replace(BASE, is_shared=True)

    assert is_stricter(BASE, replace(BASE, tags=names("t", "u")))
    assert is_stricter(BASE, BASE.without_session("a"))
    assert is_stricter(BASE, replace(BASE, expires_at=99.0))
    assert is_stricter(pinned, BASE)
    assert is_stricter(None, BASE)
    assert not is_stricter(BASE, BASE)
    assert not is_stricter(BASE, pinned)
    assert not is_stricter(BASE, replace(BASE, sessions=names("a", "b", "c"), expires_at=101.0))
    assert not is_stricter(shared, shared.without_session("a"))
