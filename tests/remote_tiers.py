"""What tests of tiers on other machines ask again and again."""

from kvkeep.testing.tier_contents import content_of, key_of, read_object, store_object
from kvkeep.tiers.base import Miss, MissCause, PutOutcome, Tier

__all__ = ["cause_of", "works_again"]


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
