"""What tests of tiers on other machines ask again and again."""

from time import monotonic

from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, Presence, PutOutcome, Tier
from kvkeep.tiers.breaker import BreakerState
from kvkeep.tiers.objects import ObjectTier
from kvkeep.tiers.resp import RespTier

__all__ = ["assert_late_then_left_alone", "cause_of", "works_again"]


def cause_of(found: bytes | Miss) -> MissCause:
    """Why a get missed."""
    assert isinstance(found, Miss)
    return found.cause


def works_again(tier: Tier, number: int = 999) -> bool:
    """Whether a put and a get succeed."""
    key = key_of(number)
    outcome = store_object(tier, key, 1000)
    return outcome in (PutOutcome.STORED, PutOutcome.PRESENT) and read_object(
        tier, key, 1000
    ) == content_of(key, 1000)


def assert_late_then_left_alone(tier: RespTier | ObjectTier, timeout_s: float) -> None:
    """What hangs is waited for some times, until the deadline, and then not asked at all."""
    start = monotonic()
    causes = [cause_of(read_object(tier, key_of(1), 1000)) for _ in range(3)]

    # Not how fast it is, but that it ends: by itself nothing would.
    assert monotonic() - start < 20 * timeout_s
    assert causes == [MissCause.LATE] * 3
    assert [stats.state for stats in tier.breakers] == [BreakerState.OPEN]
    assert cause_of(read_object(tier, key_of(1), 1000)) is MissCause.UNAVAILABLE
    assert tier.find([key_of(1)]) == [Presence.ABSENT]
    assert store_object(tier, key_of(2), 1000) is PutOutcome.FAILED
    assert tier.labels(key_of(1)) is None
    assert not tier.relabel(key_of(1), b"tag")
    assert list(tier.labelled()) == []
