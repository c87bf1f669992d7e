"""Labels of blocks that two machines use, in a real RESP server and a real object store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.blocks import stored_key
from kvkeep.cache.lifetimes import Labels, decode_labels
from kvkeep.config import CacheOptions
from kvkeep.testing.faulty_tier import Fault, FaultyTier
from kvkeep.tiers.base import Tier
from kvkeep.tiers.objects import ObjectTier
from kvkeep.tiers.resp import RespTier
from tests.lifetime_books import Clock, labels_of
from tests.lifetime_cache import LifetimeCache
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, RcloneServer, RedisServer

PROMPT = list(range(100, 112))  # three full blocks


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server for all tests of this file."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """An object store for all tests of this file."""
    pytest.importorskip("obstore")
    with RcloneServer(tmp_path_factory.mktemp("s3")) as server:
        yield server


class Machine:
    """A cache over one tier that others have as well."""

    def __init__(self, clock: Clock, tier: Tier, before: "Machine | None" = None) -> None:
        self.tier = tier
        origin: LifetimeCache | None = None if before is None else before.checked
        self.checked: LifetimeCache = LifetimeCache(clock, tiers=[tier], before=origin)

    def serve(self, options: CacheOptions, tokens: list[int] = PROMPT) -> int:
        """A request, and all that follows from it."""
        num_computed = self.checked.serve(tokens, options)
        self.put()
        return num_computed

    def put(self) -> None:
        """Let everything that could wait be written, copies of blocks and labels."""
        self.checked.cache.offload()
        self.settle()

    def settle(self) -> None:
        """The labels alone."""
        assert self.checked.below is not None
        self.checked.below.relabels.make_all_due()
        for _ in range(3):
            self.checked.cache.poll()
            self.checked.settle()

    def close_session(self, name: str) -> None:
        """End one."""
        self.checked.admin.close_session(self.checked.session_id(name))
        self.settle()

    def stored(self) -> Labels:
        """The labels that the tier has of the last block."""
        key = self.checked.chain(PROMPT).keys[-1]
        labels = decode_labels(self.tier.labels(stored_key(key, 0)) or b"")
        assert labels is not None
        return labels

    def known(self) -> Labels:
        """The labels of the last block here."""
        return labels_of(self.checked.lifetimes, self.checked.chain(PROMPT).keys[-1])

    def num_objects(self) -> int:
        """What the tier has."""
        return len(list(self.tier.objects()))


@pytest.fixture
def pair(redis: RedisServer, clock: Clock, tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one server, neither of which reads what the other has put."""
    prefix = f"kvkeep-test:{tmp_path.name}:"
    tiers = [RespTier(redis.url, key_prefix=prefix, timeout_s=20.0) for _ in range(2)]
    first = Machine(clock, tiers[0])
    second = Machine(clock, tiers[1], first)
    yield first, second
    for machine in (first, second):
        machine.checked.cache.close()


def apart(**options: object) -> CacheOptions:
    """Options of a request that computes its blocks although another machine has them."""
    return CacheOptions(read=False, **options)  # type: ignore[arg-type]


def test_a_put_of_what_is_there_joins_its_labels(pair: tuple[Machine, Machine]) -> None:
    """The longer life, and both sessions and tags, on the server and at the one that came second."""
    first, second = pair
    first.serve(apart(session="a", tags=["t"], ttl=1000))
    assert second.serve(apart(session="b", tags=["u"], ttl=10)) == len(PROMPT)

    stored = second.stored()
    assert stored.sessions == {"a", "b"}
    assert stored.tags == {"t", "u"}
    assert stored.expires_at == 2000.0
    assert second.known() == stored
    assert first.known().sessions == {"a"}


def test_labels_of_both_machines_stay_when_one_of_them_writes(
    pair: tuple[Machine, Machine],
) -> None:
    """What the other has written meanwhile is not written over, and is known from then on."""
    first, second = pair
    first.serve(apart(session="a"))
    second.serve(apart(session="b", tags=["u"]))

    session = first.checked.session_id
    first.checked.admin.fork_session(session("a"), session("c"))
    first.settle()

    assert first.stored().sessions == {"a", "b", "c"}
    assert first.stored().tags == {"u"}
    assert first.known() == first.stored()


def test_a_block_goes_with_the_last_session_of_any_machine(pair: tuple[Machine, Machine]) -> None:
    """Each ends its own; the object stays for the other, and goes when neither is left."""
    first, second = pair
    first.serve(apart(session="a"))
    second.serve(apart(session="b"))
    first.serve(CacheOptions(session="a", tags=["t"]))
    assert first.known().sessions == {"a", "b"}

    second.close_session("b")
    assert second.stored().sessions == {"a"}
    assert second.num_objects() == 3

    first.close_session("a")
    assert first.num_objects() == 0


def test_a_life_that_ended_elsewhere_is_not_gone_on_with(
    pair: tuple[Machine, Machine], clock: Clock
) -> None:
    """What lies there expired gets the labels of who computed it again, and those alone."""
    first, second = pair
    first.serve(apart(session="a", tags=["t"], ttl=10))
    clock.now_s += 10
    second.serve(apart(session="b", ttl=20))

    stored = second.stored()
    assert stored.sessions == {"b"}
    assert not stored.tags
    assert stored.expires_at == clock.now_s + 20


def test_what_was_refused_and_computed_again_is_stored_again(
    pair: tuple[Machine, Machine], clock: Clock
) -> None:
    """The object that was refused is deleted; that it was there must not keep the new one from going down."""
    first, second = pair
    first.serve(apart(ttl=10))
    clock.now_s += 10

    assert second.serve(CacheOptions()) == len(PROMPT)

    assert second.num_objects() == 3
    assert second.serve(CacheOptions(), [*PROMPT, 1]) == 1


def test_labels_that_could_not_be_written_are_written_later(
    redis: RedisServer, clock: Clock, tmp_path: Path
) -> None:
    """A tag that comes while the server does not take it is there once it does."""
    inner = RespTier(redis.url, key_prefix=f"kvkeep-test:{tmp_path.name}:", timeout_s=20.0)
    tier = FaultyTier(inner, [Fault("fail", "relabel", calls=range(3))])
    machine = Machine(clock, tier)
    machine.serve(CacheOptions())
    machine.checked.serve(PROMPT, CacheOptions(tags=["t"]))
    for _ in range(2):
        machine.checked.cache.poll()
        machine.checked.settle()
    assert tier.num_happened == {"relabel fail": 3}
    assert machine.stored().tags == frozenset()

    machine.settle()

    assert machine.stored().tags == {"t"}
    machine.checked.cache.close()


@pytest.fixture
def machines(bucket: RcloneServer, clock: Clock, tmp_path: Path) -> Iterator[list[Machine]]:
    """Two over one prefix of an object store."""

    def tier() -> ObjectTier:
        return ObjectTier(
            f"s3://bucket/{tmp_path.name}",
            endpoint=bucket.endpoint,
            access_key=S3_ACCESS_KEY,
            secret_key=S3_SECRET_KEY,
            timeout_s=30.0,
        )

    first = Machine(clock, tier())
    machines = [first, Machine(clock, tier(), first)]
    yield machines
    for machine in machines:
        machine.checked.cache.close()


def test_what_gets_a_tag_is_put_anew_where_labels_cannot_be_replaced(
    machines: list[Machine],
) -> None:
    """Another machine's purge would not find it under its old labels."""
    first, second = machines
    first.serve(CacheOptions())
    first.checked.serve(PROMPT, CacheOptions(tags=["t"]))
    first.settle()

    assert first.stored().tags == {"t"}
    query = second.checked.query(tags=("t",))
    assert second.checked.admin.purges.purge(query).deleted == 3
    assert first.num_objects() == 0


def test_what_was_pinned_leaves_a_store_that_cannot_say_that_it_is_no_more(
    machines: list[Machine],
) -> None:
    """There it would never expire, and no purge would mean it; it comes back without the pin."""
    first, _ = machines
    first.serve(CacheOptions(pin=True))
    (pin,) = first.checked.admin.pins()
    assert first.stored().pins == {pin.name}

    first.checked.admin.unpin(pin.name)
    first.settle()
    assert first.num_objects() == 0

    first.put()
    assert first.stored().pins == frozenset()


def test_what_may_live_longer_stays_in_a_store_that_cannot_say_so(
    machines: list[Machine],
) -> None:
    """A longer life, one more session, a pin: it ends earlier there, and never later."""
    first, second = machines
    first.serve(apart(session="a", ttl=10))
    second.serve(apart(session="b", ttl=1000))

    assert second.stored().sessions == {"a"}
    assert second.stored().expires_at == 1010.0
    assert second.known().sessions == {"a", "b"}
    assert second.known().expires_at == 2000.0


def test_a_put_of_what_is_there_with_fewer_tags_replaces_it(machines: list[Machine]) -> None:
    """The other machine's object lacks a tag of ours: it goes, and ours comes."""
    first, second = machines
    first.serve(apart())
    second.checked.serve(PROMPT, apart(tags=["t"]))
    second.settle()
    second.checked.serve([*PROMPT, 1], CacheOptions())
    second.settle()

    assert second.stored().tags == {"t"}
