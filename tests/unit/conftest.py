"""Books of lifetimes for whoever asks for them."""

import pytest

from kvkeep.cache.lifetimes import Lifetimes
from tests.lifetime_books import Clock, made


@pytest.fixture
def clock() -> Clock:
    """It is 1000."""
    return Clock()


@pytest.fixture
def lifetimes(clock: Clock) -> Lifetimes:
    """Books with the usual settings."""
    return made(clock)
