"""Purges of some places: they count what lies there, and leave nothing behind that lies nowhere."""

import pytest

from kvkeep.config import CacheOptions
from kvkeep.tiers.host import HostTier
from tests.lifetime_books import Clock
from tests.lifetime_cache import MANY, LifetimeCache

PROMPT = list(range(100, 112))  # three full blocks


@pytest.mark.parametrize("last", ["device", "host"])
def test_what_has_gone_from_one_place_after_the_other_is_known_no_more(
    last: str,
) -> None:
    """Each purge counts what lay there, and nothing is left behind the last of them."""
    checked = LifetimeCache(Clock(), tiers=[HostTier(MANY)])
    checked.serve(PROMPT, CacheOptions(tags=["t"]))
    checked.cache.offload()
    checked.serve([*PROMPT, 1], CacheOptions(write=False))  # on the device again
    first = "host" if last == "device" else "device"
    for place in (first, last):
        query = checked.query(everything=True, tiers=(place,))
        tried = checked.admin.purges.purge(query, dry_run=True)
        receipt = checked.admin.purges.purge(query)
        assert (tried.deleted, receipt.deleted) == (3, 3)
        assert receipt.stored == ({} if place == "device" else {"host": 3})
        assert tried.stored == receipt.stored

    assert not len(checked.lifetimes.register)
    assert checked.admin.purges.purge(checked.query(everything=True)).matched == 0
    checked.cache.close()
